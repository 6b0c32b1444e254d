"""One pass of micro-batches through the stages, as one worker of the pipeline sees it.

The worker is driven by messages: whichever micro-batch is ready next goes next, backward before
forward (1F1B), with a bound on those in flight. Exact sums are order-free, so any order is right.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from runtime.fabric.interface import Endpoint, Message, Tag
from runtime.plan import Plan, WorkerId
from runtime.salvage import Salvage, Status
from runtime.samples import Samples
from runtime.spans import BACKWARD, DATA, FORWARD, HELD_OUT, WAIT, SpanLog
from strategies.boundary import Value, flatten, unflatten
from strategies.reading import Side, Wanted, announce, read
from strategies.salvage import Losses, StepProgress
from strategies.schedule import Instruction, OneForwardOneBackward, in_flight_limit
from strategies.stage import Gradients, StageModel

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
    fault: FaultPoint
    between: Callable[[], None] = lambda: None
    """Called between micro-batches, for what should not wait for the end of the pass."""
    waiting: Waiting = field(default_factory=Waiting)
    spans: SpanLog = field(default_factory=SpanLog)

    def __post_init__(self) -> None:
        self._position = self.plan.stage_of(self.worker)
        self._is_first = self._position == 0
        self._is_last = self._position == len(self.plan.stages) - 1
        self._schedule = OneForwardOneBackward(in_flight_limit(self.plan, self.worker))

    def train(
        self, progress: StepProgress, exponents: Sequence[int] | None, salvage: Salvage | None = None
    ) -> Losses:
        """Forward and backward of all this worker's micro-batches; gradients end in the exact sums.

        ``progress`` names the step and the attempt, and takes in what becomes of every micro-batch; where
        ``salvage`` is given the step goes on from what was reached under an earlier plan.
        Returns the losses of the micro-batches that this worker finished (last stage only).
        Raises Interrupted when the membership changes meanwhile.
        """
        step, attempt = progress.step, progress.attempt
        mine = self.plan.micro_batches_of(self.worker)
        in_flight, losses = progress.in_flight, progress.losses
        forward_tag = self._tag(step, attempt, "forward")
        backward_tag = self._tag(step, attempt, "backward")
        if salvage is not None:
            self._send_again(progress, salvage, forward_tag, backward_tag)
            for micro_batch in sorted(progress.paused):
                self._backward(progress, micro_batch, [], exponents, salvage, backward_tag)
        to_start = deque(m for m in mine if progress.status(m) is None)
        started = len(mine) - len(to_start)
        announce(self.data, self.plan, self.worker, step, started=set(mine) - set(to_start))
        early: dict[int, Gradients] = {}  # of micro-batches that only this stage has to do again
        while len(progress.done) < len(mine):
            self.between()
            next_one = self._schedule.next_instruction(started < len(mine), 0, len(in_flight))
            may_start = next_one is Instruction.FORWARD
            message = self._next_message(may_start, bool(in_flight), forward_tag, backward_tag)
            if message is not None and message.tag.what == "backward":
                micro_batch = _micro_batch(message.tag)
                gradients = _unpack_gradients(message)
                if micro_batch not in in_flight:
                    early[micro_batch] = gradients
                    continue
            else:
                if message is None:
                    micro_batch = to_start.popleft()
                    value, samples = self._read(Wanted(Side.INPUTS, step, micro_batch))
                else:
                    micro_batch = _micro_batch(message.tag)
                    value, samples = _unpack_value(message)
                progress.samples[micro_batch] = samples
                self.fault("forward", step, micro_batch)
                began = time.perf_counter_ns()
                value, in_flight[micro_batch] = self.stage.forward(
                    step, micro_batch, value, train=True, check=self.endpoint.check
                )
                self.spans.add(FORWARD, began, micro_batch)
                started += 1
                if not self._is_last:
                    if progress.keeps:
                        progress.values[micro_batch] = value
                    if _status(salvage, self._position + 1, micro_batch) is None:
                        self._send_value(self._position + 1, forward_tag, micro_batch, value, samples)
                    if micro_batch in early:
                        gradients = early.pop(micro_batch)
                        self._backward(progress, micro_batch, gradients, exponents, salvage, backward_tag)
                    continue
                targets, theirs = self._read(Wanted(Side.TARGETS, step, micro_batch))
                if theirs != samples:
                    raise ValueError(
                        f"step {step}: the inputs of micro-batch {micro_batch} are of other samples than its "
                        "targets: the data must be equal, and pure functions of their place, on all workers"
                    )
                began = time.perf_counter_ns()
                loss, count, gradients = self.stage.loss_of(value, targets, train=True)
                self.spans.add(BACKWARD, began, micro_batch)
                losses[micro_batch] = (loss, count)
            self._backward(progress, micro_batch, gradients, exponents, salvage, backward_tag)
        return losses

    def _backward(
        self,
        progress: StepProgress,
        micro_batch: int,
        gradients: Gradients,
        exponents: Sequence[int] | None,
        salvage: Salvage | None,
        tag: Tag,
    ) -> None:
        """From ``gradients`` of the output, or from where an interrupt left it, to those of the input."""
        self.fault("backward", progress.step, micro_batch)
        began = time.perf_counter_ns()
        gradients = progress.paused.setdefault(micro_batch, gradients)
        # emptied and overwritten layer by layer: an interrupt leaves what backward goes on from
        self.stage.backward(
            progress.step,
            micro_batch,
            progress.in_flight[micro_batch],
            gradients,
            exponents,
            check=self.endpoint.check,
        )
        self.spans.add(BACKWARD, began, micro_batch)
        del progress.in_flight[micro_batch], progress.paused[micro_batch]
        progress.done.add(micro_batch)
        if self._is_first:
            return
        if progress.keeps:
            progress.gradients[micro_batch] = gradients
        if _status(salvage, self._position - 1, micro_batch) in (None, Status.FORWARD):
            self._send_gradients(tag, micro_batch, gradients)

    def _send_again(self, progress: StepProgress, salvage: Salvage, forward: Tag, backward: Tag) -> None:
        """What went to workers that are lost, or was dropped with the old generation."""
        for micro_batch, value in sorted(progress.values.items(), key=lambda item: item[0]):
            if salvage.status(self._position + 1, micro_batch) is None:
                samples = progress.samples[micro_batch]
                self._send_value(self._position + 1, forward, micro_batch, value, samples)
        for micro_batch, gradients in sorted(progress.gradients.items(), key=lambda item: item[0]):
            if salvage.status(self._position - 1, micro_batch) in (None, Status.FORWARD):
                self._send_gradients(backward, micro_batch, gradients)

    def evaluate(self, step: int, attempt: int, micro_batches: int) -> Losses:
        """Forward of held-out micro-batches 0 to ``micro_batches`` - 1; returns this worker's losses."""
        tag = self._tag(step, attempt, "held-out")
        mine = [m for m in range(micro_batches) if self._worker_at(self._position, m) == self.worker]
        losses: Losses = {}
        for expected in mine:
            if self._is_first:
                micro_batch, value = expected, self.data.held_out(expected)[0]
            else:
                message = self._wait([tag])
                micro_batch, value = _micro_batch(message.tag), _unpack_value(message)[0]
            began = time.perf_counter_ns()
            value, _ = self.stage.forward(step, micro_batch, value, train=False, check=self.endpoint.check)
            self.spans.add(HELD_OUT, began, micro_batch)
            if self._is_last:
                targets = self.data.held_out(micro_batch)[1]
                loss, count, _ = self.stage.loss_of(value, targets, train=False)
                losses[micro_batch] = (loss, count)
            else:
                self._send_value(self._position + 1, tag, micro_batch, value, ())
        return losses

    def _tag(self, step: int, attempt: int, what: str) -> Tag:
        return Tag(self.plan.generation, step, attempt, what)

    def _worker_at(self, position: int, micro_batch: int) -> WorkerId:
        return self.plan.assignment[position][micro_batch % self.plan.micro_batches]

    def _next_message(
        self, may_start: bool, any_in_flight: bool, forward: Tag, backward: Tag
    ) -> Message | None:
        """The next thing to do: a message, or None for a new micro-batch of the first stage."""
        backwards = [backward] if any_in_flight and not self._is_last else []
        if self._is_first:
            if not may_start:
                return self._wait(backwards)
            return self.endpoint.poll_any(backwards) if backwards else None
        return self._wait([*backwards, forward] if may_start else backwards)

    def _wait(self, tags: list[Tag]) -> Message:
        began = time.perf_counter_ns()
        try:
            message = self.endpoint.receive_any(tags)
        finally:  # an interrupted wait is what a loss costs the others: it shows
            self.spans.add(WAIT, began)
        self.waiting.peers += (time.perf_counter_ns() - began) / 1e9
        return message

    def _read(self, wanted: Wanted) -> tuple[Value, Samples]:
        began = time.perf_counter_ns()
        self.stage.pulse.enter()
        value, samples = read(self.data, wanted)
        self.stage.pulse.leave()
        self.spans.add(DATA, began, wanted.micro_batch)
        self.waiting.data += (time.perf_counter_ns() - began) / 1e9
        return value, samples

    def _send_value(self, position: int, tag: Tag, micro_batch: int, value: Value, samples: Samples) -> None:
        tensors, spec = flatten(value)
        to = self._worker_at(position, micro_batch)
        self.endpoint.send(to, tag._replace(index=micro_batch), tensors, (spec, samples))

    def _send_gradients(self, tag: Tag, micro_batch: int, gradients: Gradients) -> None:
        flowing = [gradient is not None for gradient in gradients]
        tensors: list[Tensor] = [gradient for gradient in gradients if gradient is not None]
        to = self._worker_at(self._position - 1, micro_batch)
        self.endpoint.send(to, tag._replace(index=micro_batch), tensors, flowing)


def _status(salvage: Salvage | None, stage: int, micro_batch: int) -> Status | None:
    return None if salvage is None else salvage.status(stage, micro_batch)


def _micro_batch(tag: Tag) -> int:
    assert isinstance(tag.index, int), "pipeline messages are indexed by micro-batch"
    return tag.index


def _unpack_value(message: Message) -> tuple[Value, Samples]:
    spec, samples = message.note
    return unflatten(message.tensors, spec), samples


def _unpack_gradients(message: Message) -> Gradients:
    tensors: Any = iter(message.tensors)
    return [next(tensors) if flows else None for flows in message.note]
