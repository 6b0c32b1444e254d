"""Throughput while one of eight workers has become half as fast, as a share of what is left: 7.5 of 8.

Real Ray actors whose layers' compute is emulated by sleeping (``emulated``), one of which sleeps twice as
long from some moment on. Until the controller has measured it and divided the work anew, the run shows
what an even split gives: everybody waits for the slow worker.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from rich.console import Console

from actors.cluster import RayRun, connect
from jobs.bench.degraded import LAYERS, MICRO_BATCHES, STAGES, stages_of
from jobs.bench.emulated import slow_down
from jobs.bench.report import BenchReport
from jobs.bench.resident import started, wait_for
from jobs.bench.simulated import Simulated, disturbance
from jobs.bench.sleeping import recipe_of
from jobs.recipe.recipe import Recipe
from runtime.events import StepRecord
from runtime.plan import Plan

GOAL = 0.95
WORKERS = 8
SPEED = 0.5
"""Of the slow worker, beside the others."""

FORWARD_SECONDS = 0.01
"""Per layer, so that an undisturbed step takes about eight seconds: on two cores the workers' own work for a
layer's messages is then a small part of it."""

STEPS, FEWEST_STEPS = 5, 3
"""Over how many steps a throughput is measured, after the first one of a phase; the even split's phase may
end earlier, with the controller's answer to it."""


@dataclass(frozen=True, slots=True)
class Phase:
    """The same run before, while and after. Step seconds are a median; ``workers`` is their power."""

    name: str
    workers: float
    step_seconds: float
    fastest_seconds: float
    stages: str
    slow_share: float

    def share_of_ideal(self, undisturbed: Phase) -> float:
        """Throughput beside the undisturbed one, over the share of the workers' power that is left."""
        return undisturbed.step_seconds / self.step_seconds / (self.workers / undisturbed.workers)


def recipe(pace: Path) -> Recipe:
    """The run that is measured, at the size of ``degraded``. It would go on for longer than any bench."""
    parallel = {
        "workers": WORKERS,
        "stages": STAGES,
        "micro_batches": MICRO_BATCHES,
        "cpus_per_worker": 0.0,
    }
    return recipe_of("slow", parallel, layers=LAYERS, forward_seconds=FORWARD_SECONDS, pace=str(pace))


def seconds_after(steps: Sequence[StepRecord], generation: int, moment: float) -> list[float]:
    """Seconds of the steps of ``generation`` that began after ``moment`` (``time.time()``), the first of
    them left out: a change of pace or of plan may still be felt in it."""
    return [
        record.seconds
        for record in steps
        if record.generation == generation and record.committed_at - record.seconds >= moment
    ][1:]


def work_of(plan: Plan, worker: int) -> float:
    """The worker's share of all layers of all micro-batches."""
    if worker not in plan.workers:
        return 0.0
    stage = plan.stages[plan.stage_of(worker)]
    done = (stage.stop - stage.first) * len(plan.micro_batches_of(worker))
    return done / (plan.stages[-1].stop * plan.micro_batches)


class Watch:
    """What the run has committed so far."""

    def __init__(self, run: RayRun) -> None:
        self._run = run

    def steps(self) -> Sequence[StepRecord]:
        progress = self._run.progress(0, 0)
        if progress.outcome is not None:
            raise RuntimeError(f"the run ended early: {progress.message}")
        return progress.steps

    def plan(self) -> Plan:
        plan = self._run.plan()
        assert plan is not None, "a run that has committed steps has a plan"
        return plan

    def phase(self, name: str, workers: float, plan: Plan, moment: float, slow: int) -> Phase:
        """Measured once ``STEPS`` steps of the phase are there or another plan is followed. Raises
        RuntimeError where that leaves fewer than ``FEWEST_STEPS``."""

        def enough() -> bool:
            steps = self.steps()
            over = steps[-1].generation > plan.generation
            return over or len(seconds_after(steps, plan.generation, moment)) >= STEPS

        wait_for(f"{STEPS} steps, {name}", enough)
        seconds = seconds_after(self.steps(), plan.generation, moment)
        if len(seconds) < FEWEST_STEPS:
            raise RuntimeError(f"the plan changed after {len(seconds)} steps, {name}: run the bench again")
        return Phase(name, workers, median(seconds), min(seconds), stages_of(plan), work_of(plan, slow))


def measure(folder: Path, console: Console) -> list[Phase]:
    """Undisturbed, one worker slow under the even split, and after the work was divided anew."""
    pace = folder / "pace.json"
    with started(recipe(pace), folder / "run") as run:
        watch = Watch(run)
        wait_for("the first step", lambda: bool(watch.steps()))
        even = watch.plan()
        slow = even.workers[-1]
        power = WORKERS - 1 + SPEED
        phases = [watch.phase("undisturbed", WORKERS, even, 0.0, slow)]
        console.print(f"undisturbed: {phases[-1].step_seconds:.3f} s a step", highlight=False)
        last = watch.steps()[-1].committed_at
        slow_down(pace, {run.processes()[slow]: 1 / SPEED})
        phases.append(watch.phase("even split", power, even, last, slow))
        console.print(f"even split: {phases[-1].step_seconds:.3f} s a step", highlight=False)
        wait_for("a new division of work", lambda: watch.plan().generation > even.generation)
        phases.append(watch.phase("divided anew", power, watch.plan(), last, slow))
        console.print(f"divided anew: {phases[-1].step_seconds:.3f} s a step", highlight=False)
    return phases


def report(phases: Sequence[Phase]) -> BenchReport:
    """The table, from ``measure``'s three phases."""
    undisturbed, even, anew = phases
    simulated = Simulated(WORKERS, STAGES, LAYERS, MICRO_BATCHES, FORWARD_SECONDS).slowed(SPEED)
    disturbed = disturbance(undisturbed.step_seconds, simulated[0])
    rows: list[Mapping[str, str | float | int | None]] = [
        {
            "work": phase.name,
            "stages": phase.stages,
            "slow_worker_does": phase.slow_share,
            "step_seconds": phase.step_seconds,
            "fastest_seconds": phase.fastest_seconds,
            "throughput": undisturbed.step_seconds / phase.step_seconds,
            "ideal": phase.workers / undisturbed.workers,
            "share_of_ideal": None if phase is undisturbed else phase.share_of_ideal(undisturbed),
            "simulated": None
            if phase is undisturbed
            else replace(phase, step_seconds=seconds).share_of_ideal(
                replace(undisturbed, step_seconds=simulated[0])
            ),
        }
        for phase, seconds in zip(phases, simulated, strict=True)
    ]
    share = anew.share_of_ideal(undisturbed)
    return BenchReport(
        bench="slow",
        headline={"share_of_ideal": share, "even_split_share": even.share_of_ideal(undisturbed)},
        goal=f"share_of_ideal >= {GOAL}",
        met=share >= GOAL and disturbed is None,
        rows=tuple(rows),
        notes=(
            "the layers' compute is emulated: a layer sleeps in forward and twice as long in backward, in "
            f"the slow worker {1 / SPEED:.2g} times as long; actors, messages and measured speeds are real",
            f"{LAYERS} equal layers in {STAGES} stages, {MICRO_BATCHES} micro-batches, {WORKERS} workers; "
            "stages are layers x workers; throughput and ideal are shares of the undisturbed one's",
            "simulated: the same, with the speed known exactly, by the planner's simulation",
            *([disturbed] if disturbed else []),
        ),
    )


def run(console: Console) -> BenchReport:
    """Measures; takes about five minutes. Raises RuntimeError if the run ends by itself or the work is not
    divided anew in time."""
    with tempfile.TemporaryDirectory() as folder, connect(None, WORKERS, 1.0, 0.0):
        return report(measure(Path(folder), console))
