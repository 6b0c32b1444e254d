"""What a join costs the others: how long they stand still at the boundary at which a newcomer enters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from rich.console import Console

from jobs.bench.watched import Watched, excess, intervals, kill, recipe, row, watched
from runtime.events import StepRecord, WorkerJoined

GOAL = 0.10
"""Of the median step."""

JOINS = 10
WORKERS, LAYERS, FORWARD_SECONDS = 4, 8, 0.010
PARAMETERS = 1_000_000
"""In each layer: 4 MB of parameters and 8 MB of moments; a newcomer gets half of all layers' parameters."""

STEPS = 2
"""Made by all workers before the next of them goes: the first follows the change, the others are compared
with it."""


@dataclass(frozen=True, slots=True)
class Joins:
    """One entry per join. ``pauses``: seconds for which the one of the others that waited longest stood
    still; ``excesses``: by how many seconds the step that followed took longer than the usual one, which also
    has what the newcomer makes others wait for later on."""

    pauses: list[float]
    excesses: list[float]
    step_seconds: float

    @property
    def share(self) -> float:
        return median(self.pauses) / self.step_seconds


def joining(steps: Sequence[StepRecord], workers: int) -> list[int]:
    """The generations in which a newcomer made the workers ``workers`` again."""
    return [
        later.generation
        for earlier, later in pairwise(steps)
        if earlier.workers < later.workers == workers and earlier.generation != later.generation
    ]


def joins_of(steps: Sequence[StepRecord], pauses: Sequence[float], workers: int) -> Joins:
    """From a run's records and its events' pauses."""
    undisturbed = {record.generation for record in steps if record.workers == workers}
    usual = [seconds for generation in sorted(undisturbed) for seconds in intervals(steps, generation)]
    longer = [excess(steps, generation) for generation in joining(steps, workers)]
    return Joins(list(pauses), longer, median(usual))


def measure(folder: Path, console: Console) -> Joins:
    """Has workers killed and drained, in turn, each replaced before the next one goes."""
    with watched(
        recipe("joins", WORKERS, LAYERS, FORWARD_SECONDS, parameters=PARAMETERS), folder / "joins"
    ) as run:
        for number in range(JOINS):
            leaver = run.whole(STEPS, number).workers[number % WORKERS]
            if number % 2:
                run.drain(leaver)
            else:
                kill(run.process(leaver))
        run.whole(STEPS, JOINS)
        found = _joins(run)
    console.print(
        f"join: {median(found.pauses) * 1e3:.0f} ms of {found.step_seconds * 1e3:.0f} ms", highlight=False
    )
    return found


def _joins(run: Watched) -> Joins:
    pauses = [each.event.seconds for each in run.events() if isinstance(each.event, WorkerJoined)]
    return joins_of(run.steps(), pauses, WORKERS)


def rows(found: Joins) -> list[Mapping[str, str | float | int | None]]:
    """Of the table."""
    return [
        row(
            "join",
            len(found.pauses),
            pause_ms=1e3 * median(found.pauses),
            worst_ms=1e3 * max(found.pauses),
            of_ms=1e3 * found.step_seconds,
            share=found.share,
            next_step_longer_ms=1e3 * median(found.excesses),
        )
    ]


NOTE = (
    f"join: the pause is that of the one of {WORKERS - 1} workers that stood still longest where a newcomer "
    f"entered, after a kill or a drain in turn; of_ms is the median step of all {WORKERS}"
)
