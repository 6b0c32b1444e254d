"""``reknit verify``: recomputes a run in one plain PyTorch process, compares the bits, audits the samples."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from jobs.assembly import data_arguments, optimizer_settings, paths_of
from jobs.audit import audit
from jobs.builders import build_data, build_layers
from jobs.checkpoints import checkpoint_root
from jobs.recipe.recipe import Recipe, load_recipe
from jobs.reference import Reference
from runtime.checkpoint import CheckpointReader, list_checkpoints, load_manifest
from runtime.events import FeedWorkerLost, StepRecord, WorkerLost
from runtime.run_folder import RunFolder
from strategies.model import describe
from strategies.pipeline import Data


def verify(run: str | Path, console: Console) -> bool:
    """Whether every recorded step's loss, gradient norm and fingerprint, and the final parameters, are
    those of a single process that shares no code with the runtime but the definition of the exact sum, and
    whether the ledger says that no sample was lost or repeated within an epoch.

    Raises ValueError if there is nothing to compare: no run, no finished step, ``reduction = "fast"``,
    another engine.
    """
    folder = RunFolder(run)
    facts = folder.facts()
    recipe = load_recipe(folder.recipe)
    recorded = folder.read_steps().steps
    if not recorded:
        raise ValueError(f"{folder.path} has no finished step to verify")
    if recipe.engine.name != "reknit":
        raise ValueError(
            f"{folder.path} was trained by {recipe.engine.name}, whose bits depend on the number of workers: "
            'only runs with engine.name = "reknit" can be verified'
        )
    if recipe.reduction != "exact":
        raise ValueError(
            f'{folder.path} was trained with reduction = "fast", whose bits depend on the workers: '
            'train with reduction = "exact" to verify'
        )
    device = torch.device("cuda" if facts.get("device") == "cuda" else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{folder.path} was trained on GPUs and can only be verified on one")
    torch.set_num_threads(recipe.parallel.threads)
    began = time.monotonic()
    data = build_data(recipe.data.build, data_arguments(recipe))
    reference = _reference(recipe, data, device)
    by_step = {record.step: record for record in recorded}
    last = max(by_step)
    console.print(
        f"recomputing {last} steps of {folder.name} in one process ({device.type}, "
        f"{recipe.parallel.threads} thread{'s' if recipe.parallel.threads > 1 else ''})",
        highlight=False,
        soft_wrap=True,
    )
    first_unequal: int | None = None
    for step in range(1, last + 1):
        expected = reference.step()
        record = by_step.get(step)
        if record is not None and (expected.loss, expected.grad_norm, expected.fingerprint) != _bits(record):
            first_unequal = step
            console.print(
                f"step {step}  loss {record.loss!r} instead of {expected.loss!r}, "
                f"fingerprint {record.fingerprint:016x} instead of {expected.fingerprint:016x}",
                highlight=False,
                soft_wrap=True,
            )
            break
    missing = sorted(set(range(1, last + 1)) - by_step.keys())
    parameters = None
    if first_unequal is None:
        parameters = _compare_parameters(folder, recipe, last, reference.parameters)
    same = _conclude(console, len(by_step), first_unequal, missing, parameters, time.monotonic() - began)
    return _audit(console, folder, recipe, data, last) and same


def _audit(console: Console, folder: RunFolder, recipe: Recipe, data: Data, steps: int) -> bool:
    """Whether the ledger is as it should be; True where the data set does not tell its samples."""
    samples, epoch_samples = getattr(data, "samples", None), getattr(data, "epoch_samples", None)
    if not isinstance(samples, int) or not isinstance(epoch_samples, int):
        return True
    found = audit(
        folder.read_samples(),
        steps=steps,
        micro_batches=recipe.parallel.micro_batches,
        samples=samples,
        epoch_samples=epoch_samples,
    )
    for problem in found.problems:
        console.print(problem, highlight=False, soft_wrap=True)
    starts = 1 + len(folder.facts().get("resumes", []))
    lost = sum(isinstance(entry.event, WorkerLost | FeedWorkerLost) for entry in folder.read_events().events)
    verdict = (
        "no sample lost or repeated" if not found.problems else "the samples used are NOT as they should be"
    )
    console.print(
        f"{verdict}: {found.used:,} uses in {found.steps} steps, {found.epochs} whole epochs of "
        f"{epoch_samples:,} samples and {found.begun:,} of the next ({_counted(starts, 'start')}, "
        f"{_counted(lost, 'loss')})",
        highlight=False,
        soft_wrap=True,
    )
    return not found.problems


def _counted(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _bits(record: StepRecord) -> tuple[float, float, int]:
    return record.loss, record.grad_norm, record.fingerprint


def _reference(recipe: Recipe, data: Data, device: torch.device) -> Reference:
    torch.manual_seed(recipe.run.seed)
    layers, loss = build_layers(recipe.model.build, recipe.model.arguments)
    for layer in layers:
        layer.to(device)
    paths = paths_of(recipe, len(layers))
    return Reference(
        layers,
        loss,
        data.micro_batch,
        seed=recipe.run.seed,
        micro_batches=recipe.parallel.micro_batches,
        settings=optimizer_settings(recipe),
        autocast=recipe.precision.autocast == "bf16",
        orders=None if paths is None else [paths.layers_of(path) for path in paths.of],
        slices=recipe.parallel.slices,
    )


def _compare_parameters(
    folder: RunFolder, recipe: Recipe, step: int, expected: dict[str, Tensor]
) -> tuple[int, list[str]] | None:
    """(parameters compared, names of the tensors that differ); None without a checkpoint of ``step``."""
    root = checkpoint_root(recipe, folder)
    if step not in list_checkpoints(root):
        return None
    layers, _ = build_layers(recipe.model.build, recipe.model.arguments)
    layout = describe(layers)
    different: list[str] = []
    with CheckpointReader(root, load_manifest(root, step)) as reader:
        for block in layout.blocks:
            flat_N = reader.read_state(block.index, 0, block.size)[0]
            for tensor in block.tensors:
                saved = flat_N[tensor.offset : tensor.stop].view(torch.int32)
                if not torch.equal(saved, expected[tensor.name].cpu().reshape(-1).view(torch.int32)):
                    different.append(tensor.name)
    return layout.parameters, different


def _conclude(
    console: Console,
    steps: int,
    first_unequal: int | None,
    missing: list[int],
    parameters: tuple[int, list[str]] | None,
    seconds: float,
) -> bool:
    if missing:
        console.print(f"not recorded, so not compared: steps {', '.join(map(str, missing))}", highlight=False)
    same = first_unequal is None and not missing and parameters is not None and not parameters[1]
    if same:
        assert parameters is not None
        console.print(
            f"identical, bit for bit: the loss, gradient norm and fingerprint of {steps} steps and all "
            f"{parameters[0]:,} final parameters ({seconds:.1f} s)",
            highlight=False,
            soft_wrap=True,
        )
    elif first_unequal is not None:
        console.print(f"NOT identical from step {first_unequal} on", highlight=False)
    elif parameters is None:
        console.print("the steps are identical, but there is no checkpoint of the last one", highlight=False)
    elif parameters[1]:
        console.print(f"NOT identical: {', '.join(parameters[1])}", highlight=False, soft_wrap=True)
    return same
