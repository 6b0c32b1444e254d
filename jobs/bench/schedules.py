"""The bubble of every schedule: measured in a real run, beside the simulated one and the textbook's.

Real Ray actors, one a stage; only the layers' compute is emulated by sleeping (``emulated``). A pass lasts
from its beginning, which is the same moment for all workers, to the end of the last one's last backward; the
bubble is the share of all workers' time in it that no layer takes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console

from actors.cluster import RayRun, connect
from jobs.bench.emulated import BACKWARD
from jobs.bench.report import BenchReport
from jobs.bench.resident import started, wait_for
from jobs.bench.sleeping import recipe_of
from jobs.recipe.recipe import Recipe
from runtime.plan import Plan, WorkerId
from runtime.protocol import Measured
from strategies.schedules.registry import schedule_named
from strategies.schedules.simulation import StageSeconds, Timeline, simulate
from strategies.search.formulas import FORMULAS

GOAL = 0.1
STAGES, LAYERS = 4, 8
FORWARD_SECONDS = 0.03
"""Per layer: so long that messages and sums, some milliseconds a micro-batch, are little beside it."""

STEPS = 3
"""Over how many steps a bubble is measured. A run's first is left out: it probes the gradients' scale."""

CASES: tuple[tuple[str, int, int], ...] = (
    ("gpipe", 4, 1),
    ("gpipe", 16, 1),
    ("1f1b", 16, 1),
    ("interleaved", 16, 2),
    ("zero-bubble", 16, 1),
)
"""(schedule, micro-batches, chunks)."""


def formula(schedule: str, micro_batches: int, chunks: int) -> float:
    """The textbook's bubble, input and weight gradients as long as a forward: see the schedules' files."""
    gap = (STAGES - 1) * (1 / 3 if schedule == "zero-bubble" else 1 / chunks)
    return gap / (micro_batches + gap)


@dataclass(frozen=True, slots=True)
class Bubble:
    """One schedule; ``measured`` is the median over steps, ``simulated`` has the ``handling_seconds`` that
    were measured in the same run."""

    schedule: str
    micro_batches: int
    chunks: int
    measured: float
    simulated: Timeline
    step_seconds: float
    handling_seconds: float = 0.0

    @property
    def deviation(self) -> float:
        """Of the measured bubble from the simulated one, relative."""
        return self.measured / self.simulated.bubble - 1.0


def measured_bubble(plan: Plan, measured: Mapping[WorkerId, Measured]) -> float:
    """Of one step, from what its workers measured: seconds in each layer, and those of the whole pass."""
    busy = sum(layer_seconds(plan, each) for each in measured.values())
    pass_seconds = max(each.seconds["pipeline"] for each in measured.values())
    return 1.0 - busy / (len(measured) * pass_seconds)


def handling_seconds(plan: Plan, measured: Mapping[WorkerId, Measured], works: int) -> float:
    """What workers are busy for beside layers, waits for peers and for data, in each of the ``works`` pieces
    of a micro-batch's work at a stage; the mean of all."""
    left = pieces = 0.0
    for worker, each in measured.items():
        seconds = each.seconds
        left += seconds["pipeline"] - seconds["wait_peers"] - seconds["wait_data"] - layer_seconds(plan, each)
        pieces += works * sum(len(plan.micro_batches_of(worker, k)) for k in plan.stages_of(worker))
    return max(left / pieces, 0.0)


def layer_seconds(plan: Plan, measured: Measured) -> float:
    """Of one worker in one step."""
    return sum(
        (measured.forward[layer] + measured.backward[layer]) * len(plan.micro_batches_of(measured.worker, k))
        for k in plan.stages_of(measured.worker)
        for layer in range(plan.stages[k].first, plan.stages[k].stop)
    )


def simulated(schedule: str, plan: Plan, handling: float = 0.0) -> Timeline:
    """The same plan under the simulated clock, with the seconds that the layers sleep."""
    each = BACKWARD * FORWARD_SECONDS / 2
    layers = [stage.stop - stage.first for stage in plan.stages]
    seconds = [StageSeconds(n * FORWARD_SECONDS, n * each, n * each) for n in layers]
    # the very first layer owes nobody its inputs' gradient: see ``SleepingLayer``
    seconds[0] = StageSeconds(seconds[0].forward, (layers[0] - 1) * each, (layers[0] + 1) * each)
    chunks = len(plan.stages) // STAGES
    return simulate(schedule_named(schedule, chunks), plan, seconds, handling_seconds=handling)


def recipe(schedule: str, micro_batches: int, chunks: int) -> Recipe:
    """The run that is measured. It would go on for longer than the bench lasts."""
    parallel = {
        "workers": STAGES,
        "stages": STAGES,
        "schedule": schedule,
        "chunks": chunks,
        "micro_batches": micro_batches,
        "cpus_per_worker": 0.0,
        "rebalance": False,
    }
    return recipe_of(f"schedules-{schedule}", parallel, layers=LAYERS, forward_seconds=FORWARD_SECONDS)


@dataclass(frozen=True, slots=True)
class PassSeconds:
    """Of a run under ``plan``: the medians over some steps. ``resident_bytes``: what each worker has all the
    time, in the last of them; ``processes``: the workers' ids."""

    plan: Plan
    bubble: float
    seconds: float
    handling: float
    resident_bytes: Mapping[WorkerId, int] = field(default_factory=dict)
    processes: Mapping[WorkerId, int] = field(default_factory=dict)


def measure(recipe: Recipe, folder: Path, works: int = 2, steps: int = STEPS) -> PassSeconds:
    """Runs until ``steps`` steps are measured; ``works`` as in ``handling_seconds``. Raises RuntimeError if
    the run ends by itself."""
    workers = recipe.parallel.workers
    with started(recipe, folder) as run:
        found: dict[int, tuple[float, float, float]] = {}
        resident: dict[WorkerId, int] = {}

        def enough() -> bool:
            measured, plan = _whole_step(run, workers), run.plan()
            if measured and plan is not None and (step := measured[plan.workers[0]].step) > 1:
                seconds = max(each.seconds["pipeline"] for each in measured.values())
                handling = handling_seconds(plan, measured, works)
                found[step] = measured_bubble(plan, measured), seconds, handling
                for worker, each in measured.items():
                    kinds = each.resident_bytes
                    resident[worker] = sum(kinds[kind] for kind in ("parameters", "accumulators", "shards"))
            return len(found) >= steps

        wait_for(f"{steps} steps of {recipe.parallel.schedule}", enough, poll_seconds=0.1)
        plan, processes = run.plan(), run.processes()
        assert plan is not None, "a run that has committed steps has a plan"
    bubble, seconds, handling = (median(each) for each in zip(*found.values(), strict=True))
    return PassSeconds(plan, bubble, seconds, handling, resident, processes)


def _whole_step(run: RayRun, workers: int) -> Mapping[WorkerId, Measured]:
    """What all workers have told of one step, the newest; empty where some have not."""
    progress, measured = run.progress(1 << 30, 0), run.measured()
    if progress.outcome is not None:
        raise RuntimeError(f"the run ended early: {progress.message}")
    if len(measured) < workers or len({each.step for each in measured.values()}) > 1:
        return {}
    return measured


def report(results: Sequence[Bubble]) -> BenchReport:
    """The table."""
    worst = max(abs(each.deviation) for each in results)
    return BenchReport(
        bench="schedules",
        headline={"worst_deviation": worst},
        goal=f"worst_deviation <= {GOAL}",
        met=worst <= GOAL,
        rows=tuple(
            {
                "schedule": each.schedule,
                "micro_batches": each.micro_batches,
                "chunks": each.chunks,
                "formula": formula(each.schedule, each.micro_batches, each.chunks),
                "simulated": each.simulated.bubble,
                "handling_ms": 1e3 * each.handling_seconds,
                "measured": each.measured,
                "deviation": each.deviation,
                "simulated_seconds": each.simulated.seconds,
                "measured_seconds": each.step_seconds,
                "peak_activations": max(each.simulated.peaks.values()) / (LAYERS // STAGES),
            }
            for each in results
        ),
        notes=(
            "the layers' compute is emulated: a layer sleeps in forward, as long for its input's gradient "
            "and as long for its weights'; actors, messages and sums are real",
            f"{LAYERS} equal layers on {STAGES} workers; seconds are those of the forwards and backwards of "
            "a step; the simulation is told for how long workers were busy beside their layers (taking up "
            "and sending messages) in the same run, on average (handling_ms, for each forward or backward); "
            "peak activations are in micro-batches of a worker's layers, by the simulation",
        ),
    )


def run(console: Console) -> BenchReport:
    """Measures; takes about two minutes. Raises RuntimeError if a run ends by itself."""
    results = []
    with tempfile.TemporaryDirectory() as folder, connect(None, STAGES, 1.0, 0.0):
        for number, case in enumerate(CASES):
            schedule, _, chunks = case
            works = 2 + FORMULAS[schedule].splits
            found = measure(recipe(*case), Path(folder) / f"{number}", works)
            assert len(found.plan.stages) == STAGES * chunks, "every worker has its chunks"
            timeline = simulated(schedule, found.plan, found.handling)
            each = Bubble(*case, found.bubble, timeline, found.seconds, found.handling)
            results.append(each)
            console.print(
                f"{each.schedule}, {each.micro_batches} micro-batches: bubble {each.measured:.1%}, simulated "
                f"{each.simulated.bubble:.1%}",
                highlight=False,
            )
    return report(results)
