"""The order of forwards and backwards inside a step, as a rule that needs no global clock.

Exact sums make every order of micro-batches give the same bits, so a schedule is a matter of speed and
memory only: a worker asks it for the next instruction whenever it is free, and takes whichever
micro-batch has arrived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush
from itertools import accumulate
from typing import Protocol

from runtime.plan import Plan, WorkerId


class Instruction(Enum):
    """What a free worker does next."""

    FORWARD = "forward"
    BACKWARD = "backward"
    WAIT = "wait"


class Schedule(Protocol):
    """Decides by counts of micro-batches at one worker; keeps no state of its own."""

    def next_instruction(self, forwards_ready: int, backwards_ready: int, in_flight: int) -> Instruction:
        """``forwards_ready`` and ``backwards_ready`` count micro-batches whose input has arrived;
        ``in_flight`` counts those whose forward is done and whose backward is not."""
        ...


@dataclass(frozen=True, slots=True)
class OneForwardOneBackward:
    """1F1B (Narayanan et al., PipeDream, SOSP'19, sec. 3.2), flushed every step.

    A backward goes first, since it frees activations; a forward runs while fewer than
    ``in_flight_limit`` micro-batches hold activations here. The last stage's limit is 1, its backwards
    are ready at once, and so every stage before it drains too: no order of arrival deadlocks.
    """

    in_flight_limit: int

    def next_instruction(self, forwards_ready: int, backwards_ready: int, in_flight: int) -> Instruction:
        if backwards_ready:
            return Instruction.BACKWARD
        if forwards_ready and in_flight < self.in_flight_limit:
            return Instruction.FORWARD
        return Instruction.WAIT


BURSTS = 3
"""Up to how many more micro-batches than the round trip needs a worker of unequal groups keeps."""


def in_flight_limit(plan: Plan, worker: WorkerId) -> int:
    """The most micro-batches whose activations ``worker`` keeps at once; 0 if it computes none.

    ``group_limit`` capped by the worker's micro-batches.
    """
    shape = [(stage.stop - stage.first, len(stage.workers)) for stage in plan.stages]
    return min(group_limit(shape, plan.stage_of(worker)), len(plan.micro_batches_of(worker)))


def group_limit(shape: Sequence[tuple[int, int]], k: int) -> int:
    """The most micro-batches that a worker of stage ``k`` keeps, from every stage's (layers, workers).

    ceil(workers in this and all later stages / workers in this stage). With balanced stages a
    micro-batch occupies one worker of stage j for (workers in j) / (workers in k) of its time at
    stage k, so this many keep stage k busy during a round trip. With equal groups it is the
    classical P - k for stage k of P. Micro-batches of unequal groups return in bursts, so those
    keep more to bridge the gaps: one more always, and up to ``BURSTS`` more as long as the
    activations are no more than the first stage of an even pipeline has, all layers' of one
    micro-batch. Simulated with 4% of noise, 14 + 9 + 9 layers on 3 + 2 + 2 workers are busy for
    0.87 of the bound with one more and 0.99 with three more; what is free of charge is taken.
    """
    sizes = [workers for _, workers in shape[k:]]
    limit = -(-sum(sizes) // sizes[0])
    if len(set(sizes)) > 1:
        layers = sum(layers for layers, _ in shape)
        limit = max(limit + 1, min(limit + BURSTS, layers // shape[k][0]))
    return limit


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
) -> float:
    """Seconds from the first forward to the last backward of one step under 1F1B.

    ``forward_seconds`` and ``backward_seconds`` are per layer and micro-batch at speed 1.0. Messages
    take no time; the planner adds communication by itself. ``unsteadiness`` as in
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
    return simulate_pipeline(times, unsteadiness)


GOLDEN = 0.6180339887498949
"""The golden ratio's fraction: multiples of it, less their whole part, spread evenly over 0 to 1."""


def simulate_pipeline(stages: Sequence[StageTimes], unsteadiness: float = 0.0) -> float:
    """``simulate_step`` of stages that need no plan. About 1 us for each of the 2 x stages x
    micro-batches forwards and backwards.

    ``unsteadiness`` makes every task take between 1 - u and 1 + u times its seconds, in a fixed
    sequence without a trend. Real workers fall out of step; a plan that is fast only as long as
    everybody is exactly on time should not look fast. What it returns is a pure function either way.
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
    tasks = 0

    def start(worker: int, now: float) -> None:
        nonlocal tasks
        # ``OneForwardOneBackward``, spelled out: a call for each task would double the time
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
        seconds *= 1.0 + unsteadiness * (2.0 * (tasks * GOLDEN % 1.0) - 1.0)
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
