"""What a chaos run does to its cluster and when, and what the run made of it. Pure.

After the idea of Chaos Monkey (Basiri et al., Chaos Engineering, IEEE Software 33(3), 2016), with a seed in
the place of chance.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from runtime.events import (
    ControllerRestarted,
    Paused,
    Rebalanced,
    Recovered,
    StepRecord,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
)
from runtime.plan import WorkerId
from runtime.run_folder import LoggedEvent

Kind = Literal["kill", "stop", "slow", "drain", "term", "node", "controller", "both", "join"]

KINDS: tuple[Kind, ...] = ("kill", "stop", "slow", "drain", "term", "node", "controller", "both", "join")

FIRST_AT = 3.0
SHORTEST_GAP, LONGEST_GAP = 4.0, 12.0
QUIET_END = 20.0
"""Seconds: the first strike, between strikes, and the time at the end in which the run may come to rest."""

SHORTEST_STOP, LONGEST_STOP = 0.3, 5.0
SHORTEST_SLOW, LONGEST_SLOW = 2.0, 6.0


@dataclass(frozen=True, slots=True)
class Strike:
    """One thing that is done, ``at`` seconds after the first step.

    kill: SIGKILL to a worker. stop: SIGSTOP, and SIGCONT ``seconds`` later. slow: for ``seconds`` it gets
    every other 20 ms only. drain: a notice by way of the controller. term: SIGTERM. node: a raylet is
    killed, with all workers on it. controller: SIGKILL to the controller. both: to the controller and, at
    once, to a worker. join: a node is added. ``pick`` in [0, 1) chooses among the workers, or nodes, that
    are there then.
    """

    at: float
    kind: Kind
    pick: float
    seconds: float = 0.0


def schedule(minutes: float, seed: int, nodes: int) -> tuple[Strike, ...]:
    """The strikes of a run of ``minutes`` on a cluster that begins with ``nodes`` nodes, in order.

    Every kind comes once before any comes again. Two nodes always stay, and there are never more than two
    above ``nodes``: a strike that would break this becomes the opposite one. Raises ValueError for a time in
    which there is no room for a strike.
    """
    end = minutes * 60.0 - QUIET_END
    if end <= FIRST_AT:
        least = (FIRST_AT + QUIET_END) / 60.0
        raise ValueError(f"{minutes:g} minutes are too short for chaos: give more than {least:.2f}")
    rng = random.Random(seed)
    strikes: list[Strike] = []
    waiting: list[Kind] = []
    at, present = FIRST_AT, nodes
    while at < end:
        if not waiting:
            waiting = rng.sample(KINDS, len(KINDS))
        kind = waiting.pop()
        if kind == "node" and present <= 2:
            kind = "join"
        elif kind == "join" and present >= nodes + 2:
            kind = "node"
        present += {"node": -1, "join": 1}.get(kind, 0)
        seconds = {
            "stop": rng.uniform(SHORTEST_STOP, LONGEST_STOP),
            "slow": rng.uniform(SHORTEST_SLOW, LONGEST_SLOW),
        }.get(kind, 0.0)
        strikes.append(Strike(at, kind, rng.random(), seconds))
        at += rng.uniform(SHORTEST_GAP, LONGEST_GAP)
    return tuple(strikes)


@dataclass(frozen=True, slots=True)
class Done:
    """A strike as it was carried out: ``time`` in seconds since 1970, ``what`` in words, ``workers`` those it
    was meant for; ``controller``: for it too."""

    time: float
    what: str
    workers: tuple[WorkerId, ...] = ()
    controller: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a strike until the next one: ``made`` in words, ``standstill`` the longest time between
    two commits (seconds)."""

    done: Done
    made: str
    standstill: float


def account(
    done: Sequence[Done], events: Sequence[LoggedEvent], steps: Sequence[StepRecord]
) -> tuple[Outcome, ...]:
    """What the run made of each strike. ``events`` and ``steps`` ascend in time."""
    commits = sorted(step.committed_at for step in steps)
    ends = [each.time for each in done[1:]] + [float("inf")]
    outcomes = []
    for index, (strike, end) in enumerate(zip(done, ends, strict=True)):
        again = {worker: later.time for later in reversed(done[index + 1 :]) for worker in later.workers}
        later = [entry for entry in events if entry.time >= strike.time]
        meanwhile = [entry for entry in later if entry.time < end]
        gaps = [after - before for before, after in pairwise(commits) if after > strike.time and before < end]
        outcomes.append(Outcome(strike, _made_of(strike, later, meanwhile, again), max(gaps, default=0.0)))
    return tuple(outcomes)


def _made_of(
    strike: Done,
    later: Sequence[LoggedEvent],
    meanwhile: Sequence[LoggedEvent],
    again: Mapping[WorkerId, float],
) -> str:
    """``again``: when each of the strike's workers was struck once more."""
    said: list[str] = []
    recovered: list[Recovered] = []
    for worker in strike.workers:
        mine = [entry for entry in later if entry.time < again.get(worker, float("inf"))]
        said += _fate(worker, strike.time, mine)
        recovered += [e.event for e in mine if isinstance(e.event, Recovered) and worker in e.event.lost]
    said += list(dict.fromkeys(map(_recovery, recovered)))
    if strike.controller:
        back = next((e for e in later if isinstance(e.event, ControllerRestarted)), None)
        said.append("the controller never came back" if back is None else f"back {_after(strike, back)}")
    joined = [entry.event.worker for entry in meanwhile if isinstance(entry.event, WorkerJoined)]
    if joined:
        said.append(f"{', '.join(map(str, joined))} joined")
    if any(isinstance(entry.event, Rebalanced) for entry in meanwhile):
        said.append("work divided anew")
    if any(isinstance(entry.event, Paused) for entry in meanwhile):
        said.append("paused")
    return "; ".join(said) or "went on"


def _fate(worker: WorkerId, since: float, later: Sequence[LoggedEvent]) -> list[str]:
    for entry in later:
        match entry.event:
            case WorkerLost() if entry.event.worker == worker:
                return [f"{worker} lost after {entry.time - since:.1f} s ({entry.event.reason})"]
            case WorkerLeft() if entry.event.worker == worker:
                return [f"{worker} left after {entry.time - since:.1f} s"]
    return []


def _recovery(event: Recovered) -> str:
    seconds = event.seconds
    total = seconds.detect + seconds.agree + seconds.plan + seconds.move + seconds.redo
    return f"recovered from {event.source} at version {event.from_version} in {total:.2f} s"


def _after(strike: Done, entry: LoggedEvent) -> str:
    return f"after {entry.time - strike.time:.1f} s"
