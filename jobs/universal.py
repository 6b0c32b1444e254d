"""Checkpoints that change hands: to and from DeepSpeed's universal format, and from one engine to another.

A universal checkpoint (Lian et al., "Universal Checkpointing", 2024) has a folder ``zero/NAME`` for every
parameter with ``fp32.pt``, ``exp_avg.pt``, ``exp_avg_sq.pt`` and ``step.pt``, whole tensors each. What both
formats hold is carried over bit for bit: float32 weights, both moments, and the number of steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from math import gcd
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from jobs.builders import build_layers
from jobs.checkpoints import checkpoint_root
from jobs.recipe.recipe import Recipe, load_recipe
from runtime.checkpoint import (
    ROWS,
    CheckpointDamaged,
    CheckpointReader,
    Interval,
    Manifest,
    layout_digest,
    list_checkpoints,
    load_manifest,
    newest_whole,
    write_manifest,
    write_shards,
)
from runtime.layout import Layout, ParameterUse
from runtime.run_folder import RunFolder
from strategies.model import describe

FILES = ("fp32", "exp_avg", "exp_avg_sq")
"""In the order of a slice's rows."""

OPTIMIZER_STATE = "optimizer_state.pt"

FORMAT_OF = "0.19.8"
"""The DeepSpeed version whose universal format is written."""

MOST_GROUPS = 64


def import_checkpoint(
    source: str | Path, recipe: Recipe, run_folder: str | Path, *, step: int | None = None
) -> int:
    """Makes ``run_folder`` a run of ``recipe`` that has come as far as ``source``, to go on from by
    ``--resume``.

    ``source`` is a universal checkpoint, or the folder of a run of the same model with any engine. ``step``
    says how many steps a universal checkpoint has behind it where its files do not. Returns that number.
    Raises ValueError where ``source`` is neither or does not fit the recipe's model, CheckpointDamaged for
    a checkpoint that cannot be read.
    """
    source = Path(source).expanduser().absolute()
    layout = _layout(recipe)
    if RunFolder(source).exists():
        version, pieces = _from_run(RunFolder(source), layout)
    else:
        version, pieces = _from_universal(_universal_folder(source), layout, step)
    folder = RunFolder(run_folder)
    root = checkpoint_root(recipe, folder)
    if not folder.exists() and list_checkpoints(root):
        raise ValueError(f"{root} holds checkpoints already: name another checkpoint.folder")
    RunFolder.create(folder.path, recipe.to_toml(), {"imported": str(source), "started": time.time()})
    file = write_shards(root, version, 0, 0, pieces)
    write_manifest(root, version, layout, [file], exponents=None, recipe=recipe.numerics_digest())
    return version


def export_checkpoint(run: str | Path, target: str | Path, *, version: int | None = None) -> int:
    """Writes a checkpoint of a run (default: the newest whole one) as a universal checkpoint into the new
    folder ``target``; returns its number of steps.

    Parameters are called ``layers.N.NAME``, after the list of layers. Raises ValueError if there is no such
    checkpoint or ``target`` is not empty, CheckpointDamaged if it cannot be read.
    """
    folder, target = RunFolder(run), Path(target).expanduser().absolute()
    recipe = load_recipe(folder.recipe)
    layout = _layout(recipe)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: name a new folder")
    root = checkpoint_root(recipe, folder)
    manifest = _manifest(root, layout, version)
    zero = target / "zero"
    module: dict[str, Tensor] = {}
    with CheckpointReader(root, manifest) as reader:
        for block in layout.blocks:
            state_3N = reader.read_state(block.index, 0, block.size)
            for use in _first_uses(layout, block.index):
                tensor, name = use.tensor, exported_name(use)
                rows = state_3N[:, tensor.offset : tensor.stop].reshape(ROWS, *tensor.shape)
                (zero / name).mkdir(parents=True)
                for file, values in zip(FILES, rows, strict=True):
                    torch.save({"param": values.clone()}, zero / name / f"{file}.pt")
                torch.save(torch.tensor(float(manifest.version)), zero / name / "step.pt")
                module[name] = rows[0].clone()
    # as many as DeepSpeed may look at: it restores no more groups of an optimizer than there are here
    groups: list[dict[str, Any]] = [{} for _ in range(MOST_GROUPS)]
    groups[0]["step"] = manifest.version
    torch.save({"ds_version": FORMAT_OF, "param_groups": groups}, zero / OPTIMIZER_STATE)
    states = {
        "module": module,
        "param_shapes": [{name: values.shape for name, values in module.items()}],
        "ds_version": FORMAT_OF,
        "global_steps": manifest.version,
        "iteration": manifest.version,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "lr_scheduler": {"last_batch_iteration": manifest.version - 1},
    }
    torch.save(states, target / "mp_rank_00_model_states.pt")
    return manifest.version


def exported_name(use: ParameterUse) -> str:
    return f"layers.{use.layer}.{use.name}"


def _layout(recipe: Recipe) -> Layout:
    layers, _ = build_layers(recipe.model.build, recipe.model.arguments)
    return describe(layers)


def _manifest(root: str, layout: Layout, version: int | None) -> Manifest:
    if version is not None:
        if version not in list_checkpoints(root):
            raise ValueError(f"{root} has no checkpoint of step {version}: it has {list_checkpoints(root)}")
        return load_manifest(root, version)
    manifest, _ = newest_whole(root, layout)
    if manifest is None:
        raise ValueError(f"{root} has no whole checkpoint: name the folder of a run that has written one")
    return manifest


def _first_uses(layout: Layout, block: int) -> Iterator[ParameterUse]:
    """One use of each tensor of a block: that of the first layer, by its first name."""
    seen = set()
    for use in layout.uses:
        if use.block == block and use.tensor.index not in seen:
            seen.add(use.tensor.index)
            yield use


Pieces = Mapping[Interval, Tensor]


def _from_run(folder: RunFolder, layout: Layout) -> tuple[int, Pieces]:
    recipe = load_recipe(folder.recipe)
    if layout_digest(_layout(recipe)) != layout_digest(layout):
        raise ValueError(
            f"{folder.path} is a run of another model (names, shapes or order of the parameters differ): "
            "give the recipe the model of that run"
        )
    root = checkpoint_root(recipe, folder)
    manifest = _manifest(root, layout, None)
    with CheckpointReader(root, manifest) as reader:
        pieces = {
            (block.index, 0, block.size): reader.read_state(block.index, 0, block.size)
            for block in layout.blocks
        }
    return manifest.version, pieces


def _universal_folder(source: Path) -> Path:
    latest = source / "latest_universal"
    if latest.is_file():
        source = source / latest.read_text(encoding="utf-8").strip()
    if not (source / "zero").is_dir():
        raise ValueError(
            f"{source} is neither a run's folder nor a universal checkpoint (it has no folder zero): "
            "convert a DeepSpeed checkpoint by its own ds_to_universal first"
        )
    return source


def _from_universal(folder: Path, layout: Layout, step: int | None) -> tuple[int, Pieces]:
    zero = folder / "zero"
    found: set[int] = set()
    flat = _FlatFiles()
    pieces: dict[Interval, Tensor] = {}
    for block in layout.blocks:
        state_3N = torch.zeros(ROWS, block.size)
        for use in _first_uses(layout, block.index):
            tensor = use.tensor
            place = _place(zero, layout, use)
            for row, file in enumerate(FILES):
                path = place / f"{file}.pt"
                value = _load(path)
                if isinstance(value, Tensor) and value.ndim == 1:
                    flat.take(path, value.numel(), use)
                    value = value[: tensor.size].view(tensor.shape)
                elif isinstance(value, dict):
                    value = value.get("param")
                if not isinstance(value, Tensor):
                    raise ValueError(f"{path} holds no tensor: it is no file of a universal checkpoint")
                if value.shape != tensor.shape:
                    raise _other_model(path, f"has the shape {tuple(value.shape)}", use)
                state_3N[row, tensor.offset : tensor.stop] = value.float().flatten()
            if (place / "step.pt").is_file():
                found.add(int(_load(place / "step.pt")))
        pieces[block.index, 0, block.size] = state_3N
    flat.refuse_surplus()
    if step is not None:
        return step, pieces
    if not found and (zero / OPTIMIZER_STATE).is_file():
        groups = _load(zero / OPTIMIZER_STATE).get("param_groups", [])
        found |= {int(group["step"]) for group in groups if "step" in group}
    if len(found) != 1:
        told = f"several numbers of steps ({sorted(found)})" if found else "no number of steps"
        raise ValueError(f"{folder} tells {told}: say how many it has behind it by --step")
    return found.pop(), pieces


class _FlatFiles:
    """The files of stage 3: a parameter's elements in a row, behind them what older versions of DeepSpeed pad
    the last rank with. Shapes are lost in them, so that another model is known by their lengths."""

    def __init__(self) -> None:
        self._divisor = 0
        self._surplus = 0
        self._longest: tuple[Path, int, ParameterUse] | None = None

    def take(self, path: Path, elements: int, use: ParameterUse) -> None:
        """Raises ValueError if there are fewer ``elements`` in ``path`` than the parameter has."""
        surplus = elements - use.tensor.size
        if surplus < 0:
            raise _other_model(path, f"has {elements} elements", use)
        self._divisor = gcd(self._divisor, elements)
        if surplus > self._surplus:
            self._surplus, self._longest = surplus, (path, elements, use)

    def refuse_surplus(self) -> None:
        """Raises ValueError if what is too much cannot be padding: some number of ranks must divide every
        length, and each surplus is smaller than that number."""
        if self._longest is not None and self._surplus >= self._divisor:
            path, elements, use = self._longest
            raise _other_model(path, f"has {elements} elements, more than padding explains", use)


def _other_model(path: Path, has: str, use: ParameterUse) -> ValueError:
    return ValueError(
        f"{path} {has}, but {exported_name(use)} of the recipe's model has the shape {use.tensor.shape} "
        f"({use.tensor.size} elements): give the recipe the model of the checkpoint"
    )


def _place(zero: Path, layout: Layout, use: ParameterUse) -> Path:
    """The folder of a parameter under any of the names that it may have been saved by."""
    uses = [each for each in layout.uses if each.tensor.index == use.tensor.index]
    names = [name for each in uses for name in (exported_name(each), f"{each.layer}.{each.name}")]
    for name in names:
        if (zero / name).is_dir():
            return zero / name
    raise ValueError(
        f"{zero} has no folder for {names[0]} (nor {', '.join(names[1:])}): name the parameters of the "
        "checkpoint after the recipe's list of layers, such as layers.0.weight"
    )


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: only checkpoints of Adam or AdamW with both moments can be imported"
        ) from None
    except (RuntimeError, EOFError, UnpicklingError) as error:  # what torch says of a damaged file
        cause = str(error).partition("\n")[0] or "it ends too early"
        raise CheckpointDamaged(f"{path} cannot be read: {cause}") from None
