"""A run that a bench starts and watches, and taking turns among runs that are resident together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import pi, sqrt
from pathlib import Path
from statistics import median, stdev
from typing import Any

from rich.console import Console

from actors.cluster import RayRun
from jobs.assembly import assemble, run_settings
from jobs.recipe.recipe import Recipe
from runtime.run_folder import RunFolder

PATIENCE_SECONDS = 180.0
"""How long a bench waits for the next step of a run."""

LOOK_SECONDS = 1.0
"""Between two looks at a run whose turn it is: each costs its controller some milliseconds of the processors'
time, a peer that is looked at through a file nothing."""


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
            wait_for(f"{steps} steps of {name}", enough, LOOK_SECONDS)
        finally:
            end = time.time()
            self._signal(name, signal.SIGSTOP)
        return Turn(whole_steps(commits(), begin, end), marks[0], marks[-1])


@contextmanager
def resting(
    recipes: Mapping[str, Recipe], folder: Path, steps: int, console: Console
) -> Iterator[dict[str, RayRun]]:
    """A run of each recipe, by name, past its first ``steps`` steps and stopped by a signal until its turn;
    they are recorded below ``folder``. While the next one starts, those before it rest."""
    with ExitStack() as stack:
        runs = {}
        for name, recipe in recipes.items():
            console.print(f"starting {name}", highlight=False)
            run = runs[name] = stack.enter_context(started(recipe, folder / name.replace(" ", "-")))
            wait_for(f"the first steps of {name}", partial(_has_committed, Commits(run), steps))
            stack.enter_context(Turns({name: list(run.processes().values())}))
        yield runs


def _has_committed(commits: Commits, steps: int) -> bool:
    return len(commits()) >= steps


TurnTaker = tuple[Sequence[int], Callable[[], Sequence[float]]]
"""The process ids of a job, and what tells the times of all its commits so far."""


def turn_takers(runs: Mapping[str, RayRun]) -> dict[str, TurnTaker]:
    return {name: (list(run.processes().values()), Commits(run)) for name, run in runs.items()}


def rounds_of_turns(
    jobs: Mapping[str, TurnTaker],
    rounds: int,
    steps: int,
    console: Console,
) -> dict[str, list[Turn]]:
    """``steps`` whole steps of each job in every round, another job first in each."""
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


def beside(turns: Mapping[str, Sequence[Turn]], peer: str, tokens: int) -> list[dict[str, str | float]]:
    """A row for each job of ``turns``: its throughput, with ``tokens`` in a step, and that as a share of the
    peer's. A share of seconds is the median over the rounds, beside its standard error."""
    cores = {name: core_seconds_per_step(each) for name, each in turns.items()}
    seconds = {name: median(s for turn in each for s in turn.seconds) for name, each in turns.items()}
    return [
        {
            "what": name,
            "tokens_per_second": tokens / seconds[name],
            "step_seconds": seconds[name],
            "of_peer": ratio(each, turns[peer]),
            "standard_error": standard_error(each, turns[peer]),
            "core_seconds": cores[name],
            "of_peer_by_core_seconds": cores[peer] / cores[name],
        }
        for name, each in turns.items()
    ]


def ratio(turns: Sequence[Turn], peer_turns: Sequence[Turn]) -> float:
    """Median over the rounds of peer's seconds per step over ours: above 1 we are faster."""
    return median(_ratios(turns, peer_turns))


def standard_error(turns: Sequence[Turn], peer_turns: Sequence[Turn]) -> float:
    """Of ``ratio``, as if rounds were spread normally: a median's is sqrt(pi / 2) times a mean's. 0.0 for one
    round, of which nothing can be said."""
    ratios = _ratios(turns, peer_turns)
    return sqrt(pi / 2) * stdev(ratios) / sqrt(len(ratios)) if len(ratios) > 1 else 0.0


def _ratios(turns: Sequence[Turn], peer_turns: Sequence[Turn]) -> list[float]:
    return [median(peer.seconds) / median(own.seconds) for own, peer in zip(turns, peer_turns, strict=True)]


def core_seconds(processes: Iterable[int]) -> float:
    """Seconds of processor time, user and system, that the processes have taken so far (Linux)."""
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
