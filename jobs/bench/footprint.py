"""Peak bytes of each worker beside what they should be by the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from jobs.assembly import assemble
from jobs.bench import activations
from jobs.bench.activations import Meter
from jobs.bench.resident import Commits, started, wait_for
from jobs.recipe.recipe import Recipe
from runtime.layout import Layout
from runtime.plan import Plan, WorkerId
from strategies.boundary import Value
from strategies.job import Job
from strategies.model import LossFunction, build_model
from strategies.schedules.limits import in_flight_limit
from strategies.shardings.theory import PARAMETER, STATE, SUM, VERSIONS
from strategies.stage import StageModel

STEPS = 4
"""The first probes, the second has a version to keep, from the third on memory no longer grows."""


class RecipeMaker(Protocol):
    def __call__(self, reduction: str, build: str, **arguments: Any) -> Recipe: ...


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one kind of memory of one worker; ``theory`` None where there is none."""

    name: str
    measured: int
    theory: int | None
    is_total: bool = False


def theory(plan: Plan, layout: Layout, worker: WorkerId, activation_bytes: int) -> dict[str, int]:
    """Bytes that ``worker`` needs with exact sums, by the plan, padding left out.

    With P parameters in its stage and g workers in its group: parameters 4 P, sums 8 P, and for the
    last two steps the state 12 P / g of its own shards and as much of others'. ``activation_bytes`` are
    those of one micro-batch in its stage.
    """
    stage = plan.stages[plan.stage_of(worker)]
    blocks = layout.blocks_of(stage.first, stage.stop)
    parameters = sum(tensor.size for block in blocks for tensor in block.tensors)
    shard = STATE * VERSIONS * parameters // len(stage.workers)
    return {
        "parameters": PARAMETER * parameters,
        "accumulators": SUM * parameters,
        "shards": shard + (shard if len(plan.workers) > 1 else 0),
        "activations": in_flight_limit(plan, worker) * activation_bytes,
    }


def parts(
    worker: WorkerId, stage: int, measured: Mapping[str, int], expected: Mapping[str, int]
) -> list[Part]:
    """One row per kind of memory and their total, which is what theory speaks of."""
    name = f"worker {worker} (stage {stage})"
    rows = [Part(f"{name} {kind}", measured[kind], expected[kind]) for kind in expected]
    total = sum(measured[kind] for kind in expected)
    rows.append(Part(f"{name} total", total, sum(expected.values()), is_total=True))
    rows.append(Part(f"{name} received, not yet taken", measured["inbox_peak"], None))
    return rows


def activation_bytes(job: Job, plan: Plan) -> list[int]:
    """Bytes that each stage keeps of one micro-batch, from running one here."""
    meter = Meter()

    def metered() -> tuple[list[nn.Module], LossFunction]:
        layers, loss = job.build_model()
        return activations.meter(layers, meter), loss

    model = build_model(metered, job.seed)
    holder = StageModel(model, seed=job.seed, precision=job.precision, device=torch.device("cpu"), exact=True)
    value: Value = job.build_data().micro_batch(1, 0)[0]
    sizes = []
    for stage in plan.stages:
        holder.hold((stage.first, stage.stop))
        value, kept = holder.forward(1, 0, value, train=True, check=lambda: None)
        sizes.append(meter.bytes)
        kept.clear()
    return sizes


def footprint_rows(recipe: RecipeMaker, folder: Path) -> list[Part]:
    """Runs a few steps of the exact recipe with metered layers; the rows of all workers."""
    plain = recipe("exact", "jobs.models.gpt:build")
    metered = recipe(
        "exact", "jobs.bench.activations:build", of=plain.model.build, folder=str(folder / "peaks")
    )
    with started(metered, folder / "run") as run:
        commits = Commits(run)
        wait_for("the first steps of the measuring run", lambda: len(commits()) >= STEPS)
        plan, measured, processes = run.plan(), run.measured(), run.processes()
        assert plan is not None, "a run that has committed steps has a plan"
        peaks = {w: activations.read_peak(folder / "peaks", process) for w, process in processes.items()}
    job = assemble(plain, str(folder))
    layout = build_model(job.build_model, job.seed).layout
    one_micro_batch = activation_bytes(job, plan)
    rows: list[Part] = []
    for worker in plan.workers:
        stage = plan.stage_of(worker)
        seen = {**measured[worker].resident_bytes, "activations": peaks[worker]}
        rows += parts(worker, stage, seen, theory(plan, layout, worker, one_micro_batch[stage]))
    return rows
