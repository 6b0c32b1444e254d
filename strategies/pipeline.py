"""The passes of micro-batches through the stages, as one worker of the pipeline sees them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from runtime.fabric.interface import Endpoint, Message, Tag
from runtime.plan import Plan, WorkerId
from runtime.salvage import Salvage
from runtime.samples import Samples
from runtime.spans import DATA, HELD_OUT, WAIT, SpanLog
from strategies.boundary import Value, flatten, unflatten
from strategies.reading import Wanted, read
from strategies.salvage import Losses, StepProgress
from strategies.schedules.instructions import Schedule
from strategies.sequence.team_pass import TeamPass
from strategies.stage import StageModel
from strategies.training_pass import TrainingPass

FaultPoint = Callable[[str, int, int], None]
"""(where, step, micro-batch): a place at which a fault may be injected."""


class Data(Protocol):
    """A data set as the pipeline reads it: pure functions of their arguments. What else one may have:
    ``strategies.reading``."""

    def micro_batch(self, step: int, micro_batch: int) -> tuple[Value, Value]:
        """(inputs of the first layer, targets of the loss)."""
        ...

    def held_out(self, micro_batch: int) -> tuple[Value, Value]:
        """As ``micro_batch``, of samples that are never trained on."""
        ...


class Aside(Protocol):
    """What comes while micro-batches are under way and is no part of their passes."""

    def channels(self) -> Sequence[Tag]: ...

    def take(self, message: Message) -> None: ...


@dataclass
class Waiting:
    """Seconds a worker spent waiting for peers and for data."""

    peers: float = 0.0
    data: float = 0.0


@dataclass
class Pipeline:
    """One worker's part in the passes of one plan."""

    endpoint: Endpoint
    plan: Plan
    worker: WorkerId
    stage: StageModel
    data: Data
    schedule: Schedule
    fault: FaultPoint
    aside: Aside
    between: Callable[[], None] = lambda: None
    """Called between micro-batches, for what should not wait for the end of the pass."""
    waiting: Waiting = field(default_factory=Waiting)
    spans: SpanLog = field(default_factory=SpanLog)

    def train(
        self, progress: StepProgress, exponents: Sequence[int] | None, salvage: Salvage | None = None
    ) -> Losses:
        """Forward and backward of all this worker's micro-batches; gradients end in the exact sums.

        See ``TrainingPass``.
        """
        passing = TeamPass if self.plan.teams else TrainingPass
        return passing(self, progress, exponents, salvage).run()

    def evaluate(
        self, step: int, attempt: int, micro_batches: int, path: Sequence[int] | None = None
    ) -> Losses:
        """Forward of held-out micro-batches 0 to ``micro_batches`` - 1; returns this worker's losses.

        ``path``: the stages that they pass, from the first to the last one; None: all.
        """
        path = range(len(self.plan.stages)) if path is None else path
        what = "held-out" if len(path) == len(self.plan.stages) else f"held-out by {len(path)} to"
        following = dict(pairwise(path))
        stages = self.plan.stages_of(self.worker)
        passed = [k for k in stages if k in path]
        others = [Tag(self.plan.generation, step, attempt, f"{what} {k}") for k in passed if k > 0]
        mine = [(k, m) for k in passed for m in range(micro_batches) if self._worker_at(k, m) == self.worker]
        to_start = [m for k, m in reversed(mine) if k == 0]
        losses: Losses = {}
        for _ in mine:
            # what has come goes before what begins here: chunks of one worker feed each other
            message = self.endpoint.poll_any(others) if to_start and others else None
            if message is None and to_start:
                k, micro_batch = 0, to_start.pop()
                value = self.stage.split(self.data.held_out(micro_batch)[0])
            else:
                message = message or self.wait(others)
                assert isinstance(message.tag.index, tuple), "indexed by stage and micro-batch"
                k, micro_batch = message.tag.index
                value = unflatten(message.tensors, message.note)
            began = time.perf_counter_ns()
            value, _ = self.stage.forward(
                step,
                micro_batch,
                value,
                train=False,
                check=self.check,
                stage=stages.index(k),
            )
            self.spans.add(HELD_OUT, began, micro_batch)
            if k not in following:
                targets = self.data.held_out(micro_batch)[1]
                loss, count, _ = self.stage.loss_of(value, targets, train=False)
                losses[micro_batch] = (loss, count)
            else:
                tensors, spec = flatten(value)
                then = following[k]
                tag = Tag(self.plan.generation, step, attempt, f"{what} {then}", (then, micro_batch))
                self.endpoint.send(self._worker_at(then, micro_batch), tag, tensors, spec)
        return losses

    def _worker_at(self, stage: int, micro_batch: int) -> WorkerId:
        """Who computes a held-out one: nobody needs a team for that, nor keeps anything of it."""
        plan = self.plan
        row = plan.stages[stage].workers if plan.teams else plan.assignment[stage]
        return row[micro_batch % len(row)]

    def wait(self, tags: Iterable[Tag]) -> Message:
        """The first message on any of the channels; of several the one that is earliest in ``tags``."""
        with self._waits():
            return self._receive(tuple(tags))

    def wait_for(self, sender: WorkerId, tag: Tag) -> Message:
        """As ``wait``, for one message of one worker. What comes aside waits meanwhile."""
        with self._waits():
            return self.endpoint.receive(sender, tag)

    @contextmanager
    def _waits(self) -> Iterator[None]:
        began = time.perf_counter_ns()
        try:
            yield
        finally:  # an interrupted wait is what a loss costs the others: it shows
            self.spans.add(WAIT, began)
            self.waiting.peers += (time.perf_counter_ns() - began) / 1e9

    def _receive(self, tags: tuple[Tag, ...]) -> Message:
        """What comes aside is dealt with first: others may wait for it, or for room where it lies."""
        aside = tuple(self.aside.channels())
        channels = {tag[:4] for tag in aside}
        while True:
            message = self.endpoint.receive_any((*aside, *tags))
            if message.tag[:4] not in channels:
                return message
            self.aside.take(message)

    def check(self) -> None:
        """Between two layers: raises Interrupted as the endpoint does, and deals with what has come aside."""
        self.endpoint.check()
        aside = self.aside.channels()
        while aside and (message := self.endpoint.poll_any(aside)) is not None:
            self.aside.take(message)

    def read(self, wanted: Wanted) -> tuple[Value, Samples]:
        """What the data says; waiting for it counts as such."""
        began = time.perf_counter_ns()
        self.stage.pulse.enter()
        value, samples = read(self.data, wanted)
        self.stage.pulse.leave()
        self.spans.add(DATA, began, wanted.micro_batch)
        self.waiting.data += (time.perf_counter_ns() - began) / 1e9
        return value, samples
