"""A run that a bench starts and watches, and taking turns among runs that are resident together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from actors.cluster import RayRun
from jobs.assembly import assemble, run_settings
from jobs.recipe import Recipe
from runtime.run_folder import RunFolder

PATIENCE_SECONDS = 180.0
"""How long a bench waits for the next step of a run."""


@contextmanager
def started(recipe: Recipe, folder: Path) -> Iterator[RayRun]:
    """A run of ``recipe`` on the connected Ray, recorded in ``folder``; its actors are gone at the end."""
    job = assemble(recipe, str(folder / "checkpoints"))
    RunFolder.create(folder, recipe.to_toml(), {}, resume=False)
    with RayRun(job, run_settings(recipe, folder)) as run:
        yield run


def wait_for(what: str, ready: Callable[[], bool], poll_seconds: float = 0.2) -> None:
    """Polls until ``ready``. Raises RuntimeError after ``PATIENCE_SECONDS``."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not happen within {PATIENCE_SECONDS:.0f} s")
        time.sleep(poll_seconds)


class Commits:
    """``time.time()`` of every commit of a run so far. Raises RuntimeError if the run has ended."""

    def __init__(self, run: RayRun) -> None:
        self._run = run
        self._times: list[float] = []

    def __call__(self) -> list[float]:
        progress = self._run.progress(len(self._times), 0)
        if progress.outcome is not None:
            raise RuntimeError(f"the run ended early: {progress.message}")
        self._times += [record.committed_at for record in progress.steps]
        return self._times


def whole_steps(commits: Iterable[float], begin: float, end: float) -> list[float]:
    """Seconds of the steps that began (with the commit before) and ended from ``begin`` to ``end``."""
    inside = sorted(commit for commit in commits if begin <= commit <= end)
    return [later - earlier for earlier, later in pairwise(inside)]


@dataclass(frozen=True, slots=True)
class Mark:
    """How many steps a job had committed when its processes had taken ``core_seconds``."""

    commits: int
    core_seconds: float


@dataclass(frozen=True, slots=True)
class Turn:
    """The whole steps' seconds, and marks at the first and the last commit that the turn saw."""

    seconds: list[float]
    first: Mark
    last: Mark


def core_seconds_per_step(turns: Sequence[Turn]) -> float:
    """Processor seconds of a job's processes per step, over all its turns: outside them it stands still."""
    first, last = turns[0].first, turns[-1].last
    return (last.core_seconds - first.core_seconds) / (last.commits - first.commits)


class Turns:
    """Lets one of several resident jobs run at a time; the processes of the others are stopped."""

    def __init__(self, processes: Mapping[str, Sequence[int]]) -> None:
        self._processes = processes

    def __enter__(self) -> Turns:
        for name in self._processes:
            self._signal(name, signal.SIGSTOP)
        return self

    def __exit__(self, *_: Any) -> None:
        for name in self._processes:
            self._signal(name, signal.SIGCONT)

    def _signal(self, name: str, number: signal.Signals) -> None:
        for process in self._processes[name]:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def take(self, name: str, commits: Callable[[], Sequence[float]], steps: int) -> Turn:
        """Lets ``name`` run until ``steps`` whole steps lie inside its turn."""
        begin = time.time()
        marks: list[Mark] = []

        def enough() -> bool:
            times = commits()
            inside = sum(commit >= begin for commit in times)
            if inside and (not marks or len(times) > marks[-1].commits):
                marks.append(Mark(len(times), core_seconds(self._processes[name])))
            return inside > steps

        self._signal(name, signal.SIGCONT)
        try:
            wait_for(f"{steps} steps of {name}", enough)
        finally:
            end = time.time()
            self._signal(name, signal.SIGSTOP)
        return Turn(whole_steps(commits(), begin, end), marks[0], marks[-1])


def rounds_of_turns(
    jobs: Mapping[str, tuple[Sequence[int], Callable[[], Sequence[float]]]],
    rounds: int,
    steps: int,
    console: Console,
) -> dict[str, list[Turn]]:
    """``steps`` whole steps of each job in every round, another job first in each. ``jobs``: process ids, and
    what tells the times of all commits so far."""
    turns: dict[str, list[Turn]] = {name: [] for name in jobs}
    names = list(jobs)
    with Turns({name: processes for name, (processes, _) in jobs.items()}) as control:
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                turns[name].append(control.take(name, jobs[name][1], steps))
            last = ", ".join(f"{name} {median(turns[name][-1].seconds):.3f} s" for name in names)
            console.print(f"round {turn + 1} of {rounds}: {last}", highlight=False)
    return turns


def core_seconds(processes: Iterable[int]) -> float:
    """Seconds of processor time, user and system, that the processes have taken so far (Linux)."""
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
