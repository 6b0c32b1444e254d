"""``reknit plan``: which strategy a recipe's model should be trained with, and what the others would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from jobs.amounts import bytes_of
from jobs.assembly import assemble
from jobs.recipe.recipe import Recipe, load_recipe
from jobs.recipe.sharding import possible_shardings
from strategies.boundary import Value, flatten
from strategies.job import Job
from strategies.model import build_model
from strategies.planning.costs import CostModel
from strategies.search.cost import Problem
from strategies.search.search import NothingFits, Proposal, in_words, search
from strategies.search.space import Space
from strategies.sequence.phases import cut
from strategies.warm_up import profile

SIMULATED = 12
"""How many of the best of each micro-batch size are simulated too."""

TEAMS = (1, 2, 4, 8)
"""Which sequence degrees are weighed where the recipe does not say in how many slices a sequence is cut."""

OFFLOAD = (2, 1)
"""The window and the move that are weighed where the recipe names none."""


@dataclass(frozen=True, slots=True)
class Row:
    """One proposal, and the size and number of the micro-batches that it is for."""

    proposal: Proposal
    micro_batch_size: int
    micro_batches: int


def sizes_of(micro_batch_size: int, micro_batches: int) -> tuple[tuple[int, int], ...]:
    """(size, number) of micro-batches of the same global batch: as given, half as large, twice as large."""
    sizes = [(micro_batch_size, micro_batches)]
    if micro_batch_size % 2 == 0:
        sizes.append((micro_batch_size // 2, micro_batches * 2))
    if micro_batches % 2 == 0:
        sizes.append((micro_batch_size * 2, micro_batches // 2))
    return tuple(sizes)


def measured_costs(job: Job, device: torch.device, link_bytes_per_second: float) -> CostModel:
    """One micro-batch of the job through each layer, here and now. Raises ValueError where its sequence
    cannot be cut into the job's slices."""
    torch.set_num_threads(job.threads)
    model = build_model(job.build_model, job.seed)
    value, targets = job.build_data().micro_batch(1, 0)
    plain = replace(job.precision, recompute=())
    shared = _divisible(value, TEAMS[-1]) and _divisible(targets, TEAMS[-1])
    if job.sequence_slices > 1:
        for side in (value, targets):
            cut(flatten(side)[0], job.sequence_slices)  # refused here as a worker would
        shared = True
    found = profile(
        model,
        value,
        targets,
        seed=job.seed,
        precision=plain,
        device=device,
        detailed=True,
        shared=shared,
    )
    return CostModel.profiled(
        model.layout,
        found,
        link_bytes_per_second=link_bytes_per_second,
        host_state=job.host_state,
        slices=job.sequence_slices if job.sequence_slices > 1 else None,
    )


def _divisible(value: Value, slices: int) -> bool:
    try:
        cut(flatten(value)[0], slices)
    except ValueError:
        return False
    return True


def space_of(recipe: Recipe, costs: CostModel) -> Space:
    """Everything that the recipe's values leave room for, but the size of micro-batches."""
    slices = recipe.parallel.slices
    shardings = possible_shardings(recipe.reduction, slices)
    if slices > 1:
        return Space(shardings=shardings, sequences=tuple(range(1, slices + 1)))
    given = recipe.parallel.offload
    offload = OFFLOAD if given is None else (given.window, given.move)
    return Space(
        shardings=shardings,
        sequences=TEAMS if costs.sharing else (1,),
        # where all is in one memory it takes more of it, and time
        offloads=(None, offload) if costs.host_state else (None,),
    )


def propose(
    recipe: Recipe,
    costs: Sequence[tuple[int, int, CostModel]],
    workers: int,
    limit: int | None,
    most: int,
) -> list[Row]:
    """The ``most`` best rows over all (size, number, costs) of micro-batches. Raises NothingFits."""
    rows, problems = [], []
    for size, number, each in costs:
        try:
            found = search(
                Problem(each, number),
                space_of(recipe, each),
                workers,
                limit,
                most=most,
                simulated=min(most, SIMULATED),
            )
        except NothingFits as problem:
            problems.append(problem)
            continue
        rows += [Row(proposal, size, number) for proposal in found]
    if not rows:
        raise problems[0]
    rows.sort(key=lambda row: (not row.proposal.simulated, row.proposal.step_seconds))
    return rows[:most]


def show_plan(
    path: Path,
    settings: Sequence[str],
    workers: int | None,
    memory: str | None,
    link: float | None,
    most: int,
    console: Console,
) -> list[Row]:
    """Profiles the recipe's model, searches, and prints the choice with its runners-up. ``link`` is in bytes
    per second (None: the recipe's). Raises ValueError for a recipe or an amount that cannot be, and where
    nothing fits."""
    recipe = load_recipe(path, settings)
    if recipe.engine.name != "reknit":
        raise ValueError("a DeepSpeed engine divides work by its own rule: set engine.name to reknit to plan")
    link = recipe.fabric.link_bytes_per_second if link is None else link
    count = recipe.parallel.workers if workers is None else workers
    if count < 1 or most < 1 or link <= 0:
        raise ValueError("--workers and --rows must be at least 1, and --link more than 0")
    limit = None if memory is None else bytes_of(memory)
    use_gpu = recipe.parallel.gpus_per_worker > 0 and torch.cuda.is_available()
    device = torch.device("cuda" if use_gpu else "cpu")
    costs = []
    for size, number in sizes_of(recipe.parallel.micro_batch_size, recipe.parallel.micro_batches):
        sized = [*settings, f"parallel.micro_batch_size={size}", f"parallel.micro_batches={number}"]
        job = assemble(load_recipe(path, _faultless(sized)), "")
        costs.append((size, number, measured_costs(job, device, link)))
    rows = propose(recipe, costs, count, limit, most)
    has = f"{count} worker{'s' * (count > 1)}" + (f" of {in_words(limit)}" if limit else "")
    console.print(table(f"{recipe.run.name}: {has}", rows))
    for line in explanation(recipe, rows, costs, device):
        console.print(line, highlight=False, soft_wrap=True)
    return rows


def _faultless(settings: Sequence[str]) -> list[str]:
    # faults name micro-batches, of which there may be fewer now
    return [*settings, "faults=[]"]


def table(title: str, rows: Sequence[Row]) -> Table:
    """The choice first, then the runners-up; ``batches`` are the number of micro-batches x their size,
    ``team`` the workers that compute each together, ``on device`` the layers whose parameters are not in host
    memory."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("layers x workers")
    for column in ("schedule", "shards", "recomputed"):
        shown.add_column(column)
    teams = any(row.proposal.strategy.sequence > 1 for row in rows)
    offloads = any(row.proposal.strategy.offload is not None for row in rows)
    for column in ("team",) * teams + ("on device",) * offloads:
        shown.add_column(column, no_wrap=True)
    for column in ("batches", "step s", "behind", "bubble", "memory"):
        shown.add_column(column, justify="right", no_wrap=True)
    best = rows[0].proposal.step_seconds
    for row in rows:
        each, strategy = row.proposal, row.proposal.strategy
        shown.add_row(
            stages_in_words(each),
            strategy.schedule + (f" x{strategy.chunks}" if strategy.chunks > 1 else ""),
            strategy.sharding,
            layers_in_words(strategy.recompute),
            *(str(strategy.sequence),) * teams,
            *("all" if strategy.offload is None else "{}+{}".format(*strategy.offload),) * offloads,
            f"{row.micro_batches}x{row.micro_batch_size}",
            f"{each.step_seconds:.4g}" + ("" if each.simulated else "*"),
            f"{each.step_seconds / best - 1:.1%}",
            f"{each.bubble:.1%}",
            in_words(each.memory_bytes),
        )
    return shown


def stages_in_words(proposal: Proposal) -> str:
    """Layers x workers of every stage, such as ``4x2 4x2``; stages of one group have the group's workers."""
    sizes = proposal.sizes * proposal.strategy.chunks
    parts = [f"{b - a}x{size}" for (a, b), size in zip(pairwise(proposal.bounds), sizes, strict=True)]
    if len(set(parts)) == 1 and len(parts) > 1:
        return f"{len(parts)} of {parts[0]}"
    return " ".join(parts)


def layers_in_words(layers: Sequence[int]) -> str:
    """``0-3 7``, or ``none``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return " ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs) or "none"


def explanation(
    recipe: Recipe, rows: Sequence[Row], costs: Sequence[tuple[int, int, CostModel]], device: torch.device
) -> list[str]:
    """What the table rests on, and how to have the choice."""
    chosen = rows[0]
    each = next(found for size, _, found in costs if size == chosen.micro_batch_size)
    seconds = sum(each.forward_seconds) + sum(each.backward_seconds)
    lines = [
        f"by one micro-batch of {chosen.micro_batch_size} through {len(each.forward_seconds)} layers on this "
        f"machine's {device.type} ({seconds:.4g} s, of which {sum(each.forward_seconds):.4g} s forward) and "
        f"links taken to carry {each.link_bytes_per_second / 1e9:g} GB/s; a layer of "
        f"{in_words(max(each.parameter_bytes))} of parameters is the largest, "
        f"one of {in_words(max(each.kept_bytes))} of activations keeps most"
    ]
    if any(row.proposal.strategy.offload is not None for row in rows):
        lines.append(f"host memory taken to send {each.host_bytes_per_second / 1e9:g} GB/s to the device")
    if any(not row.proposal.simulated for row in rows):
        lines.append("* by the cost model alone; the others are simulated instruction by instruction")
    parallel = chosen.proposal.strategy
    values: dict[str, object] = {
        "parallel.stages": len(chosen.proposal.sizes),
        "parallel.schedule": parallel.schedule,
        "parallel.chunks": parallel.chunks,
        "parallel.sharding": parallel.sharding,
        "parallel.micro_batches": chosen.micro_batches,
        "parallel.micro_batch_size": chosen.micro_batch_size,
        "precision.recompute": list(parallel.recompute) or "none",
    }
    slices = max(recipe.parallel.slices, parallel.sequence)
    if slices > 1:
        values |= {"parallel.sequence": parallel.sequence, "parallel.sequence_slices": slices}
    wanted = " ".join(f"--set {key}={str(value).replace(' ', '')}" for key, value in values.items())
    # what names its strategy searches for nothing, and then has no memory to keep to
    without = ["parallel.memory"] * (recipe.parallel.memory is not None)
    if parallel.offload is not None:
        wanted += " --set 'parallel.offload={{window={},move={}}}'".format(*parallel.offload)
    elif recipe.parallel.offload is not None:
        without.append("parallel.offload")
    if without:
        wanted += f", without {' and '.join(without)}"
    return [*lines, f"to have it: {wanted}"]
