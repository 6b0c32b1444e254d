"""Runs a schedule's instructions under a simulated clock: who computes what when, and what is kept meanwhile.

The workers obey the very generators that the real ones do; messages take no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from runtime.plan import Plan, WorkerId
from runtime.salvage import Task
from strategies.schedules.instructions import Offer, Place, Schedule, Tally, Work

TIE = 1e-9
"""Relative: what ends within so little of the same moment ends at the same moment."""


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """One micro-batch at one stage, at speed 1.0. A whole backward takes both of its parts."""

    forward: float
    input_gradient: float
    weight_gradient: float

    def times(self, factor: float) -> StageSeconds:
        return StageSeconds(
            factor * self.forward, factor * self.input_gradient, factor * self.weight_gradient
        )

    def of(self, work: Work) -> float:
        if work is Work.FORWARD:
            return self.forward
        if work is Work.INPUT_GRADIENT:
            return self.input_gradient
        if work is Work.WEIGHT_GRADIENT:
            return self.weight_gradient
        return self.input_gradient + self.weight_gradient


class Span(NamedTuple):
    """``worker`` does ``work`` from ``begin`` to ``end`` seconds."""

    worker: WorkerId
    stage: int
    micro_batch: int
    work: Work
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step's pass. ``peaks[w]`` is the most that worker w kept at once, in layers x micro-batches."""

    spans: tuple[Span, ...]
    peaks: Mapping[WorkerId, int]

    @property
    def seconds(self) -> float:
        """From the first forward to the last backward."""
        return max(span.end for span in self.spans)

    def busy(self, worker: WorkerId) -> float:
        """Seconds for which ``worker`` computes."""
        return sum(span.end - span.begin for span in self.spans if span.worker == worker)

    @property
    def bubble(self) -> float:
        """The share of all workers' time in which they do not compute."""
        return 1.0 - sum(map(self.busy, self.peaks)) / (len(self.peaks) * self.seconds)


class _Worker:
    """What has come for one worker, and what its schedule offers."""

    def __init__(self, schedule: Schedule, plan: Plan, worker: WorkerId) -> None:
        self.place = Place.of(plan, worker)
        self.tallies = [Tally(len(plan.micro_batches_of(worker, k))) for k in self.place.stages]
        self.inputs: dict[tuple[Work, int], list[int]] = {}
        for chunk in range(len(self.tallies)):
            backwards: list[int] = []  # whole or in parts, it is the same that comes
            self.inputs |= {(work, chunk): [] for work in Work}
            self.inputs |= {(work, chunk): backwards for work in (Work.BACKWARD, Work.INPUT_GRADIENT)}
        self.is_idle = True
        self.peak = self._held = 0
        self._layers = [plan.stages[k].stop - plan.stages[k].first for k in self.place.stages]
        self._offers = schedule(self.place, self.tallies)
        self.offer: Offer = next(self._offers, ())

    def give(self, stage: int, work: Work, micro_batch: int) -> None:
        chunk = self.place.stages.index(stage)
        heappush(self.inputs[work, chunk], micro_batch)

    def take(self) -> tuple[int, int, Work] | None:
        """(stage, micro-batch, work) of what it does next, None if it has to wait."""
        for work, chunk in self.offer:
            waiting = self.inputs[work, chunk]
            if waiting and self.tallies[chunk].allows(work):
                self.is_idle = False
                return self.place.stages[chunk], heappop(waiting), work
        return None

    def done(self, stage: int, micro_batch: int, work: Work) -> None:
        chunk = self.place.stages.index(stage)
        self.tallies[chunk].add(work)
        if work is Work.FORWARD:
            self._held += self._layers[chunk]
            if self._held > self.peak:
                self.peak = self._held
        elif work is Work.INPUT_GRADIENT:
            heappush(self.inputs[Work.WEIGHT_GRADIENT, chunk], micro_batch)
        else:
            self._held -= self._layers[chunk]
        self.is_idle = True
        self.offer = next(self._offers, ())


def simulate(
    schedule: Schedule,
    plan: Plan,
    seconds: Sequence[StageSeconds],
    speeds: Mapping[WorkerId, float] | None = None,
    room: int | None = None,
    message_seconds: float = 0.0,
    handling_seconds: float = 0.0,
) -> Timeline:
    """One pass of ``plan``'s micro-batches; ``seconds`` has one entry a stage, ``message_seconds`` are
    those from one worker to another. ``handling_seconds``: for so long a worker is busy with each piece of
    work beside the layers (taking up and sending messages, say); they are no part of its span.

    ``room``: for how many layers x micro-batches a worker has memory. Raises ValueError where a worker keeps
    more than that, and where the schedule deadlocks.
    """
    workers = {worker: _Worker(schedule, plan, worker) for worker in plan.workers}
    events: list[tuple[float, bool, WorkerId, Task, Work]] = []
    """(when, whether an input comes and not something ends, who, what of which work)."""
    spans: list[Span] = []
    lasting = [{work: each.of(work) for work in Work} for each in seconds]
    assignment = plan.assignment

    def send(now: float, sender: WorkerId | None, task: Task, work: Work) -> None:
        worker = assignment[task[0]][task[1]]
        delay = message_seconds if sender not in (None, worker) else 0.0
        heappush(events, (now + delay, True, worker, task, work))

    def end(now: float, worker: WorkerId, task: Task, work: Work) -> None:
        stage, micro_batch = task
        workers[worker].done(stage, micro_batch, work)
        if work is Work.FORWARD:
            following = plan.after(micro_batch, stage)
            if following is None:
                send(now, worker, task, Work.BACKWARD)
            else:
                send(now, worker, (following, micro_batch), Work.FORWARD)
        elif work is not Work.WEIGHT_GRADIENT:
            before = plan.before(micro_batch, stage)
            if before is not None:
                send(now, worker, (before, micro_batch), Work.BACKWARD)

    for micro_batch in range(plan.micro_batches):
        send(0.0, None, (0, micro_batch), Work.FORWARD)
    while events:
        now, woken = events[0][0], set()
        while events and events[0][0] <= now * (1 + TIE):
            _, comes, worker, task, work = heappop(events)
            woken.add(worker)
            if comes:
                workers[worker].give(task[0], work, task[1])
            else:
                end(now, worker, task, work)
        for worker in sorted(woken):
            each = workers[worker]
            if each.is_idle and (taken := each.take()) is not None:
                stage, micro_batch, work = taken
                begins = now + handling_seconds
                ends = begins + lasting[stage][work] / (1.0 if speeds is None else speeds[worker])
                spans.append(Span(worker, stage, micro_batch, work, begins, ends))
                heappush(events, (ends, False, worker, (stage, micro_batch), work))
    _check(workers, room)
    return Timeline(tuple(spans), {worker: each.peak for worker, each in workers.items()})


def _check(workers: Mapping[WorkerId, _Worker], room: int | None) -> None:
    for worker, each in workers.items():
        if not all(tally.is_finished for tally in each.tallies):
            left = sum(tally.total - tally.started + tally.held for tally in each.tallies)
            raise ValueError(
                f"the schedule deadlocks: worker {worker} waits for {_in_words(each.offer)} and has {left} "
                "micro-batches to finish; let it offer what can always be done"
            )
        if room is not None and each.peak > room:
            raise ValueError(
                f"the schedule keeps activations of {each.peak} layers x micro-batches on worker {worker}, "
                f"which has room for {room}: choose one that keeps fewer, or recompute layers"
            )


def _in_words(offer: Offer) -> str:
    return " or ".join(instruction.work.value for instruction in offer) or "nothing"
