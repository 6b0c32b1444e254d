"""How long a step's pipeline takes under 1F1B: a simulation quick enough for the planner.

``schedules.simulation`` runs any schedule's own instructions and draws them; this one knows 1F1B by heart and
is several times as fast, because a recovery waits for it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate

from runtime.plan import Plan, WorkerId
from strategies.schedules.limits import group_limit

_draws = random.Random(0)
_DRAWN = [_draws.uniform(-1.0, 1.0) for _ in range(8191)]
_APART = 1367
"""Tasks between the beginnings of two draws."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """One stage as the simulation sees it. Seconds are per micro-batch at speed 1.0; ``row[m]`` is the
    position in ``speeds`` of the worker that computes micro-batch m."""

    forward_seconds: float
    backward_seconds: float
    speeds: Sequence[float]
    row: Sequence[int]
    in_flight_limit: int


def simulate_step(
    plan: Plan,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    speeds: Mapping[WorkerId, float],
    unsteadiness: float = 0.0,
    draw: int = 0,
) -> float:
    """Seconds from the first forward to the last backward of one step under 1F1B.

    ``forward_seconds`` and ``backward_seconds`` are per layer and micro-batch at speed 1.0. Messages
    take no time; the planner adds communication by itself. ``unsteadiness`` and ``draw`` as in
    ``simulate_pipeline``.
    """
    shape = [(stage.stop - stage.first, len(stage.workers)) for stage in plan.stages]
    times = []
    for k, (stage, assigned) in enumerate(zip(plan.stages, plan.assignment, strict=True)):
        place = {worker: i for i, worker in enumerate(stage.workers)}
        times.append(
            StageTimes(
                sum(forward_seconds[stage.first : stage.stop]),
                sum(backward_seconds[stage.first : stage.stop]),
                [speeds[worker] for worker in stage.workers],
                [place[worker] for worker in assigned],
                group_limit(shape, k),
            )
        )
    return simulate_pipeline(times, unsteadiness, draw)


def simulate_pipeline(stages: Sequence[StageTimes], unsteadiness: float = 0.0, draw: int = 0) -> float:
    """``simulate_step`` of stages that need no plan. About 1 us for each of the 2 x stages x
    micro-batches forwards and backwards.

    ``unsteadiness`` makes every task take between 1 - u and 1 + u times its seconds, as drawn once and for
    all; each ``draw`` begins elsewhere in what was drawn. Real workers fall out of step; a plan that is fast
    only as long as everybody is exactly on time should not look fast. What it returns is a pure function
    either way.
    """
    first_of = list(accumulate((len(stage.speeds) for stage in stages), initial=0))
    rows = [[first_of[k] + i for i in stage.row] for k, stage in enumerate(stages)]
    stage_of = [k for k, stage in enumerate(stages) for _ in stage.speeds]
    forward = [stage.forward_seconds / speed for stage in stages for speed in stage.speeds]
    backward = [stage.backward_seconds / speed for stage in stages for speed in stage.speeds]
    limit = [stage.in_flight_limit for stage in stages for _ in stage.speeds]
    workers, last = first_of[-1], len(stages) - 1
    # heaps of micro-batches whose input is there, the lowest first
    forwards: list[list[int]] = [[] for _ in range(workers)]
    backwards: list[list[int]] = [[] for _ in range(workers)]
    in_flight = [0] * workers
    idle = [True] * workers
    running: list[tuple[float, int, int, bool]] = []  # a worker runs one thing: no ties
    tasks = draw * _APART

    def start(worker: int, now: float) -> None:
        nonlocal tasks
        # ``one_f_one_b``, spelled out: a call for each task would double the time
        if backwards[worker]:
            micro_batch, is_forward, seconds = heappop(backwards[worker]), False, backward[worker]
            in_flight[worker] -= 1
        elif forwards[worker] and in_flight[worker] < limit[worker]:
            micro_batch, is_forward, seconds = heappop(forwards[worker]), True, forward[worker]
            in_flight[worker] += 1
        else:
            return
        idle[worker] = False
        tasks += 1
        seconds *= 1.0 + unsteadiness * _DRAWN[tasks % len(_DRAWN)]
        heappush(running, (now + seconds, worker, micro_batch, is_forward))

    for micro_batch, worker in enumerate(rows[0]):
        heappush(forwards[worker], micro_batch)
    for worker in range(len(stages[0].speeds)):
        start(worker, 0.0)
    now = 0.0
    while running:
        now, worker, micro_batch, is_forward = heappop(running)
        idle[worker] = True
        k = stage_of[worker]
        if is_forward and k < last:
            peer = rows[k + 1][micro_batch]
            heappush(forwards[peer], micro_batch)
        elif is_forward:
            peer = worker
            heappush(backwards[worker], micro_batch)
        elif k > 0:
            peer = rows[k - 1][micro_batch]
            heappush(backwards[peer], micro_batch)
        else:
            peer = worker
        if idle[peer] and peer != worker:
            start(peer, now)
        start(worker, now)
    assert not any(in_flight), "the schedule left micro-batches behind"
    return now
