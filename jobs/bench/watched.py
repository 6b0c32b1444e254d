"""A run under changes of membership, as a bench watches it: steps, plans, and what the log says of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from actors.cluster import RayRun
from actors.recorder import RunProgress
from jobs.bench.resident import started, wait_for
from jobs.bench.sleeping import recipe_of
from jobs.recipe.recipe import Recipe
from runtime.events import StepRecord
from runtime.plan import Plan, WorkerId
from runtime.run_folder import LoggedEvent, RunFolder, read_json_lines
from runtime.spans import KINDS

END_SECONDS = 60.0


def recipe(name: str, workers: int, layers: int, forward_seconds: float, **model: Any) -> Recipe:
    """A run in two stages whose lost workers are replaced and whose work is divided anew for no other
    reason. Four micro-batches a worker. ``model``: further arguments of ``traced.build``."""
    parallel = {
        "workers": workers,
        "min_workers": 2,
        "max_workers": workers,
        "rebalance": False,
        "stages": 2,
        "micro_batches": 4 * workers,
        "cpus_per_worker": 0.0,
    }
    return recipe_of(
        name,
        parallel,
        build="jobs.bench.traced:build",
        layers=layers,
        forward_seconds=forward_seconds,
        **model,
    )


Spans = Mapping[WorkerId, Sequence[tuple[str, float, float]]]
"""(kind, began, ended) of what each worker did in a step, in seconds since 1970."""


def spans_of(record: Mapping[str, Any]) -> Spans:
    """One line of a timeline."""
    began = record["began"]
    return {
        int(worker): [
            (KINDS[kind], began + start / 1e6, began + (start + duration) / 1e6)
            for kind, _, start, duration in zip(*[iter(flat)] * 4, strict=True)
        ]
        for worker, flat in record["workers"].items()
    }


class Watched:
    """A run that is under way."""

    def __init__(self, run: RayRun, recipe: Recipe, folder: RunFolder) -> None:
        self._run = run
        self._recipe = recipe
        self._folder = folder

    def _progress(self) -> RunProgress:
        progress = self._run.progress(0, 0)
        if progress.outcome is not None:
            raise RuntimeError(f"the run ended early: {progress.message}")
        return progress

    def whole(self, steps: int, joins: int) -> Plan:
        """The plan, once ``joins`` newcomers have come in and a full membership has made so many steps
        under it. Raises RuntimeError if the run ends or it takes too long."""
        found: list[Plan] = []

        def ready() -> bool:
            progress, plan = self._progress(), self._run.plan()
            if plan is None or len(plan.workers) < self._recipe.parallel.workers:
                return False
            made = sum(record.generation == plan.generation for record in progress.steps)
            came = sum(type(event).__name__ == "WorkerJoined" for event in progress.events)
            found[:] = [plan]
            return made >= steps and came >= joins

        wait_for(f"{steps} steps of all workers after {joins} joins", ready)
        return found[0]

    def smaller(self, steps: int) -> Plan:
        """The plan that follows a loss or a notice, once ``steps`` steps were made under it."""
        found: list[Plan] = []

        def ready() -> bool:
            progress, plan = self._progress(), self._run.plan()
            if plan is not None and len(plan.workers) < self._recipe.parallel.workers:
                found[:] = [plan]
            # a replacement may come in before they are seen to have made so many
            made = [record for record in progress.steps if found and record.generation == found[0].generation]
            return len(made) >= steps

        wait_for(f"{steps} steps of those who are left", ready)
        return found[0]

    def drain(self, worker: WorkerId) -> None:
        """Has it leave at a step boundary."""
        assert self._run.drain(worker, "the bench wants it to go"), "it is at work"

    def process(self, worker: WorkerId) -> int:
        return self._run.processes()[worker]

    def events(self) -> Sequence[LoggedEvent]:
        """All that has been logged so far."""
        return self._folder.read_events().events

    def timeline(self) -> Mapping[int, Spans]:
        """What the workers did in the newest steps and in those around events, by step; the newest step so
        far is there. Raises RuntimeError if that takes too long."""
        newest = self.steps()[-1].step
        found: dict[int, Spans] = {}

        def ready() -> bool:
            records, _ = read_json_lines(self._folder.timeline_file)
            found.update({record["step"]: spans_of(record) for record in records})
            return newest in found

        wait_for(f"the timeline of step {newest}", ready)
        return found

    def steps(self) -> Sequence[StepRecord]:
        """All that has been recorded so far."""
        return self._folder.read_steps().steps

    def stop(self) -> None:
        """Ends the run in good order. Raises RuntimeError if it does not, or if a step was skipped, done
        twice or not of the whole batch."""
        self._run.stop()
        ended = self._run.wait(END_SECONDS)
        progress = self._run.progress(0, 0)
        if not ended or progress.outcome != "interrupted":
            raise RuntimeError(f"the run did not end at a step boundary as told: {progress.message}")
        check(self.steps(), self._recipe.parallel.micro_batches * self._recipe.parallel.micro_batch_size)


def kill(process: int) -> float:
    """SIGKILL; returns ``time.time()`` of it."""
    at = time.time()
    os.kill(process, signal.SIGKILL)
    return at


@contextmanager
def watched(recipe: Recipe, path: Path) -> Iterator[Watched]:
    """A run of ``recipe`` recorded in ``path``; it ends in good order where the block does."""
    with started(recipe, path) as run:
        found = Watched(run, recipe, RunFolder(path))
        yield found
        found.stop()


def check(steps: Sequence[StepRecord], batch: int) -> None:
    """Raises RuntimeError unless the steps are 1, 2, 3 ... and all of ``batch`` samples."""
    if [record.step for record in steps] != list(range(1, len(steps) + 1)):
        raise RuntimeError("the run's record has gaps or steps that were committed twice")
    if any(record.samples != batch for record in steps):
        raise RuntimeError(f"a step was not of all {batch} samples")


def intervals(steps: Sequence[StepRecord], generation: int) -> list[float]:
    """Seconds from commit to commit under one plan; the step that follows its change is left out."""
    commits = [record.committed_at for record in steps if record.generation == generation]
    return [later - earlier for earlier, later in pairwise(commits)]


def excess(steps: Sequence[StepRecord], generation: int) -> float:
    """By how many seconds the first step under a plan took longer, from commit to commit, than the median
    of the others under it. Raises ValueError where there are none."""
    first = next((i for i, record in enumerate(steps) if record.generation == generation), 0)
    usual = intervals(steps, generation)
    if not first or not usual:
        raise ValueError(f"generation {generation} has too few steps to compare its first one with")
    return steps[first].committed_at - steps[first - 1].committed_at - median(usual)


def row(what: str, count: int, **figures: float | int | None) -> Mapping[str, str | float | int | None]:
    """A row of the table of changes: milliseconds of pauses, and of what they are compared with."""
    columns = ("pause_ms", "worst_ms", "of_ms", "share", "next_step_longer_ms", "moved_mb")
    assert set(figures) <= set(columns)
    return {"what": what, "times": count, **{column: figures.get(column) for column in columns}}
