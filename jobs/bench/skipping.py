"""What a step takes when micro-batches skip stages, beside one that passes all of them: measured and
simulated.

Real Ray actors on emulated compute, as in the bench ``schedules``; the first and the last layer (an
embedding and a head) take no time here. Both runs have the same model and workers, one stage group each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from actors.cluster import connect
from jobs.bench.emulated import BACKWARD
from jobs.bench.report import BenchReport
from jobs.bench.schedules import PassSeconds, measure
from jobs.bench.sleeping import recipe_of
from jobs.recipe.recipe import Recipe
from runtime.plan import Plan
from strategies.schedules.registry import schedule_named
from strategies.schedules.simulation import StageSeconds, simulate

GOAL = 0.1
STAGES, LAYERS, MICRO_BATCHES = 4, 13, 16
FORWARD_SECONDS = 0.02
"""Of each layer between the first and the last."""

TAKEN = (4, 3, 2)
"""Stages on a path: all, and fewer."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """One run; ``simulated`` seconds are of its own plan and paths."""

    taken: int
    measured: PassSeconds
    simulated: float


def simulated(plan: Plan, handling: float) -> float:
    """Seconds of a pass of ``plan`` under the simulated clock."""
    each = BACKWARD * FORWARD_SECONDS / 2
    quick = {0, plan.stages[-1].stop - 1}
    slow = [len(set(range(stage.first, stage.stop)) - quick) for stage in plan.stages]
    seconds = [StageSeconds(n * FORWARD_SECONDS, n * each, n * each) for n in slow]
    return simulate(schedule_named("skippipe", 1), plan, seconds, handling_seconds=handling).seconds


def recipe(taken: int) -> Recipe:
    """The run that is measured."""
    parallel = {
        "workers": STAGES,
        "stages": STAGES,
        "schedule": "skippipe",
        "micro_batches": MICRO_BATCHES,
        "cpus_per_worker": 0.0,
        "rebalance": False,
    }
    return recipe_of(
        f"skipping-{taken}",
        parallel,
        paths={"stages": STAGES, "taken": taken},
        layers=LAYERS,
        forward_seconds=FORWARD_SECONDS,
        quick_ends=True,
    )


def report(results: Sequence[Skipped]) -> BenchReport:
    """The table; the first of ``results`` passes every stage."""
    whole = results[0]
    deviations = [
        abs((each.measured.seconds / whole.measured.seconds) / (each.simulated / whole.simulated) - 1.0)
        for each in results[1:]
    ]
    return BenchReport(
        bench="skipping",
        headline={"worst_deviation": max(deviations)},
        goal=f"worst_deviation of a step's seconds beside the full one's from the simulated <= {GOAL}",
        met=max(deviations) <= GOAL,
        rows=tuple(
            {
                "taken": f"{each.taken} of {STAGES}",
                "measured_seconds": each.measured.seconds,
                "beside_full": each.measured.seconds / whole.measured.seconds,
                "simulated_seconds": each.simulated,
                "simulated_beside_full": each.simulated / whole.simulated,
                "bubble": each.measured.bubble,
                "handling_ms": 1e3 * each.measured.handling,
            }
            for each in results
        ),
        notes=(
            "the layers' compute is emulated: a layer sleeps in forward, and twice as long in backward; "
            "actors, messages and sums are real",
            f"{LAYERS} layers, of which the first and the last take no time, {MICRO_BATCHES} micro-batches, "
            f"{STAGES} workers in as many groups; seconds are those of the forwards and backwards of a step",
        ),
    )


def run(console: Console) -> BenchReport:
    """Measures; takes about a minute. Raises RuntimeError if a run ends by itself."""
    results = []
    with tempfile.TemporaryDirectory() as folder, connect(None, STAGES, 1.0, 0.0):
        for taken in TAKEN:
            found = measure(recipe(taken), Path(folder) / f"{taken}")
            results.append(Skipped(taken, found, simulated(found.plan, found.handling)))
            console.print(
                f"{taken} of {STAGES} stages: {found.seconds:.3g} s, simulated {results[-1].simulated:.3g} s",
                highlight=False,
            )
    return report(results)
