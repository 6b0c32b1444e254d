"""Throughput after losing 1, 2 and 3 of 8 and of 16 workers, as a share of what is left of them.

Real Ray actors, really killed; only the layers' compute is emulated by sleeping (``emulated``), so that
two cores can host sixteen workers. The ideal after k losses is (n - k) / n of the undisturbed throughput.
Beside what was measured stands what the planner's simulation says of the same losses: what lies between
the two is the machine's and the messages', what is missing in the simulation is the plan's.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from rich.console import Console

from actors.cluster import RayRun, connect
from jobs.bench.emulated import BACKWARD
from jobs.bench.report import BenchReport
from jobs.bench.resident import started, wait_for
from jobs.bench.simulated import Simulated, disturbance
from jobs.bench.sleeping import recipe_of
from jobs.recipe.recipe import Recipe
from runtime.events import StepRecord
from runtime.plan import Plan

GOAL = 0.95
LOSSES = 3
STAGES, LAYERS, MICRO_BATCHES = 4, 32, 64
"""The depth of a Llama of 7 or 8 billion parameters, and four micro-batches for every stage of each of the
four pipelines of 16 workers: from there on the bubble is small (Huang et al., GPipe, NeurIPS'19, sec. 2.3).
Undisturbed, both numbers of workers divide all three evenly."""

OTHER_STAGES: tuple[int | Literal["auto"], ...] = (2, 8, "auto")
"""Other layouts that are simulated only. The fewer gaps the undisturbed pipeline has, the more a loss shows:
a single stage of 16 workers computes 4 micro-batches each, one of 15 would need 5."""

FORWARD_SECONDS = {8: 0.005, 16: 0.01}
"""Per layer, so that a step takes four to five seconds with either number of workers."""
STEPS = 5
"""Over how many steps a throughput is measured. The first after a change is left out."""


@dataclass(frozen=True, slots=True)
class Degraded:
    """Throughput with ``lost`` of ``workers`` gone. Step seconds are a median; sleep does not vary, so
    the fastest step tells how far other processes on the machine stood in the way. ``layer_seconds``:
    one layer's forward and backward of one micro-batch.
    """

    workers: int
    lost: int
    step_seconds: float
    fastest_seconds: float
    stages: str
    layer_seconds: float

    def busy_share(self) -> float:
        """The share of their time for which the workers that are left compute. The rest is gaps."""
        work = LAYERS * MICRO_BATCHES * self.layer_seconds
        return work / (self.step_seconds * (self.workers - self.lost))

    def share_of_ideal(self, undisturbed: Degraded) -> float:
        """Throughput beside the undisturbed one, over the share of the workers that are left."""
        assert undisturbed.lost == 0 and undisturbed.workers == self.workers
        left = (self.workers - self.lost) / self.workers
        return undisturbed.step_seconds / self.step_seconds / left


def recipe(workers: int) -> Recipe:
    """The run that is measured. It would go on for longer than any bench lasts."""
    parallel = {
        "workers": workers,
        "stages": STAGES,
        "micro_batches": MICRO_BATCHES,
        "cpus_per_worker": 0.0,
    }
    seconds = FORWARD_SECONDS[workers]
    return recipe_of(f"degraded-{workers}", parallel, layers=LAYERS, forward_seconds=seconds)


def settled(steps: Sequence[StepRecord], workers: int) -> list[float]:
    """Seconds of the steps made by ``workers`` workers, ascending in time, the first left out: it is
    computed in part by others, and probes the gradients' scale or pays for the change."""
    return [record.seconds for record in steps if record.workers == workers][1:]


def stages_of(plan: Plan) -> str:
    """Layers x workers of every stage."""
    return " ".join(f"{stage.stop - stage.first}x{len(stage.workers)}" for stage in plan.stages)


def victim(plan: Plan) -> int:
    """Who is killed next: a worker of the largest stage group, the highest id of it."""
    return max(max(plan.stages, key=lambda stage: len(stage.workers)).workers)


def _measure(run: RayRun, workers: int, lost: int) -> Degraded:
    def measured() -> list[float]:
        progress = run.progress(0, 0)
        if progress.outcome is not None:
            raise RuntimeError(f"the run ended early: {progress.message}")
        return settled(progress.steps, workers - lost)

    wait_for(f"{STEPS} steps of {workers - lost} workers", lambda: len(measured()) >= STEPS)
    seconds, plan = measured(), run.plan()
    assert plan is not None, "a run that has committed steps has a plan"
    each = (1 + BACKWARD) * FORWARD_SECONDS[workers]
    return Degraded(workers, lost, median(seconds), min(seconds), stages_of(plan), each)


def _lose(run: RayRun) -> None:
    plan = run.plan()
    assert plan is not None, "a run that has committed steps has a plan"
    os.kill(run.processes()[victim(plan)], signal.SIGKILL)


def measure(workers: int, folder: Path, console: Console) -> list[Degraded]:
    """Throughput of ``workers`` workers with 0 to ``LOSSES`` of them killed, one after the other."""
    results = []
    console.print(f"starting {workers} workers", highlight=False)
    with started(recipe(workers), folder) as run:
        for lost in range(LOSSES + 1):
            if lost:
                _lose(run)
            results.append(_measure(run, workers, lost))
            console.print(
                f"{workers} workers, {lost} lost: {results[-1].step_seconds:.3f} s a step", highlight=False
            )
    return results


def _simulated(workers: int, stages: int | Literal["auto"]) -> list[float]:
    """Seconds of a step after 0 to ``LOSSES`` losses: the plans for the same victims, simulated."""
    size = Simulated(workers, stages, LAYERS, MICRO_BATCHES, FORWARD_SECONDS[workers])
    return size.after_losses(LOSSES, victim)


def simulated_shares(workers: int, stages: int | Literal["auto"]) -> list[float]:
    """``share_of_ideal`` after 1 to ``LOSSES`` losses, simulated."""
    undisturbed, *degraded = _simulated(workers, stages)
    return [
        undisturbed / seconds * workers / (workers - lost) for lost, seconds in enumerate(degraded, start=1)
    ]


def _layout_note(workers: int, stages: int | Literal["auto"]) -> str:
    layout = f"{stages} stages" if stages != "auto" else "as many stages as the planner likes"
    worst = min(simulated_shares(workers, stages))
    return f"simulated only, {workers} workers, {layout}: {worst:.3f} of the ideal at worst"


def report(results: Sequence[Sequence[Degraded]]) -> BenchReport:
    """The table. Each inner sequence is one number of workers, the undisturbed one first."""
    rows: list[Mapping[str, str | float | int | None]] = []
    worst = float("inf")
    for series in results:
        simulated = simulated_shares(series[0].workers, STAGES)
        for each in series:
            share = each.share_of_ideal(series[0])
            if each.lost:
                worst = min(worst, share)
            rows.append(
                {
                    "workers": each.workers,
                    "lost": each.lost,
                    "step_seconds": each.step_seconds,
                    "fastest_seconds": each.fastest_seconds,
                    "throughput": series[0].step_seconds / each.step_seconds,
                    "ideal": (each.workers - each.lost) / each.workers,
                    "share_of_ideal": share if each.lost else None,
                    "simulated": simulated[each.lost - 1] if each.lost else None,
                    "busy": each.busy_share(),
                    "stages": each.stages,
                }
            )
    others = tuple(_layout_note(series[0].workers, stages) for series in results for stages in OTHER_STAGES)
    disturbed = tuple(
        f"{series[0].workers} workers: {sentence}"
        for series in results
        if (sentence := disturbance(series[0].step_seconds, _simulated(series[0].workers, STAGES)[0]))
    )
    return BenchReport(
        bench="degraded",
        headline={"worst_share_of_ideal": worst},
        goal=f"worst_share_of_ideal >= {GOAL}",
        met=worst >= GOAL and not disturbed,
        rows=tuple(rows),
        notes=(
            "the layers' compute is emulated: a layer sleeps in forward and twice as long in backward; "
            "actors, messages, sums and kills are real",
            f"{LAYERS} equal layers in {STAGES} stages, {MICRO_BATCHES} micro-batches; stages are "
            "layers x workers; throughput and ideal are shares of the undisturbed one's, which has the "
            "pipeline's own gaps (busy: the share of their time for which workers compute); a changed "
            "cluster may have one stage fewer",
            "simulated: the same plans and losses by the planner's simulation",
            *others,
            *disturbed,
        ),
    )


def run(console: Console) -> BenchReport:
    """Measures; takes about four minutes. Raises RuntimeError if a run ends by itself."""
    results = []
    for workers in FORWARD_SECONDS:
        with tempfile.TemporaryDirectory() as folder, connect(None, workers, 1.0, 0.0):
            results.append(measure(workers, Path(folder) / "run", console))
    return report(results)
