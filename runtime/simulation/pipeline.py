"""A simulated worker's pass of micro-batches; the twin of ``strategies.pipeline``."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from runtime.fabric.interface import Message, Tag
from runtime.plan import Plan
from runtime.salvage import Salvage, Status, StepProgress
from runtime.simulation.process import Waits
from runtime.simulation.toy import sample

if TYPE_CHECKING:
    from runtime.simulation.step import SimStep


SimProgress = StepProgress[list[int], int, int, int]


class SimPipeline:
    """One worker's part in the passes of one plan."""

    def __init__(self, step: SimStep, plan: Plan) -> None:
        self._step, self.plan = step, plan
        self.worker, self.endpoint, self.stage = step.worker, step.endpoint, step.stage
        self.me = step.me
        self._place = plan.stage_of(self.me)

    def train(self, progress: SimProgress, salvage: Salvage | None) -> Waits[dict[int, int]]:
        """Forward and backward of this worker's micro-batches, backward first."""
        place, last, step = self._place, len(self.plan.stages) - 1, progress.step
        mine = self.plan.micro_batches_of(self.me)
        forward = Tag(self.plan.generation, step, progress.attempt, "forward")
        backward = forward._replace(what="backward")
        if salvage is not None:
            self._send_again(progress, salvage, forward, backward)
            for micro_batch in sorted(progress.paused):
                yield from self._backward(progress, micro_batch, 0, salvage, backward)
        to_start = deque(m for m in mine if place == 0 and progress.status(m) is None)
        early: dict[int, int] = {}  # gradients of micro-batches that only this stage has to do again
        while len(progress.done) < len(mine):
            yield from self._step.take_what_came(step - 1)
            message = self.endpoint.poll_any([backward, forward])
            if message is None and not to_start:
                message = yield from self.endpoint.receive_any([backward, forward])
            if message is not None and message.tag.what == "backward":
                micro_batch, gradient = _micro_batch(message), message.note
                if micro_batch not in progress.in_flight:
                    early[micro_batch] = gradient
                    continue
            else:
                micro_batch = to_start.popleft() if message is None else _micro_batch(message)
                value = sample(step, micro_batch) if message is None else message.note
                yield from self.worker.fault("forward")
                value = yield from self._forward(progress, micro_batch, value)
                if place < last:
                    if progress.keeps:
                        progress.values[micro_batch] = value
                    if _status(salvage, place + 1, micro_batch) is None:
                        self._send_value(forward, micro_batch, value)
                    if micro_batch in early:
                        gradient = early.pop(micro_batch)
                        yield from self._backward(progress, micro_batch, gradient, salvage, backward)
                    continue
                progress.losses[micro_batch] = self.worker.model.loss(value)
                gradient = value
            yield from self._backward(progress, micro_batch, gradient, salvage, backward)
        return dict(progress.losses)

    def _forward(self, progress: SimProgress, micro_batch: int, value: int) -> Waits[int]:
        yield from self.worker.compute(self.stage.first, self.stage.stop, "forward")
        inputs = []
        for layer in range(self.stage.first, self.stage.stop):
            inputs.append(value)
            value = self.worker.model.forward(layer, value, self.stage.working)
        progress.in_flight[micro_batch] = inputs
        return value

    def _backward(
        self, progress: SimProgress, micro_batch: int, gradient: int, salvage: Salvage | None, tag: Tag
    ) -> Waits[None]:
        """From ``gradient`` of the output, or from where an interrupt left it. An interrupt shows before the
        first of the layers that are left, or in their middle."""
        yield from self.worker.fault("backward")
        gradient = progress.paused.setdefault(micro_batch, gradient)
        inputs = progress.in_flight[micro_batch]
        while inputs:
            count = -(-len(inputs) // 2)
            top = self.stage.first + len(inputs)
            yield from self.worker.compute(top - count, top, "backward")
            for layer in reversed(range(top - count, top)):
                gradient, parts = self.worker.model.backward(
                    layer, inputs.pop(), gradient, self.stage.working
                )
                for block, part in parts.items():
                    self.stage.accumulators[block] += part
            progress.paused[micro_batch] = gradient
        del progress.in_flight[micro_batch], progress.paused[micro_batch]
        progress.done.add(micro_batch)
        if self._place == 0:
            return
        if progress.keeps:
            progress.gradients[micro_batch] = gradient
        if _status(salvage, self._place - 1, micro_batch) in (None, Status.FORWARD):
            self._send_gradient(tag, micro_batch, gradient)

    def _send_again(self, progress: SimProgress, salvage: Salvage, forward: Tag, backward: Tag) -> None:
        """What went to workers that are lost, or was dropped with the old generation."""
        for micro_batch, value in sorted(progress.values.items()):
            if salvage.status(self._place + 1, micro_batch) is None:
                self._send_value(forward, micro_batch, value)
        for micro_batch, gradient in sorted(progress.gradients.items()):
            if salvage.status(self._place - 1, micro_batch) in (None, Status.FORWARD):
                self._send_gradient(backward, micro_batch, gradient)

    def _send_value(self, tag: Tag, micro_batch: int, value: int) -> None:
        to = self.plan.assignment[self._place + 1][micro_batch]
        self.endpoint.send(to, tag._replace(index=micro_batch), value)

    def _send_gradient(self, tag: Tag, micro_batch: int, gradient: int) -> None:
        to = self.plan.assignment[self._place - 1][micro_batch]
        self.endpoint.send(to, tag._replace(index=micro_batch), gradient)


def _status(salvage: Salvage | None, stage: int, micro_batch: int) -> Status | None:
    return None if salvage is None else salvage.status(stage, micro_batch)


def _micro_batch(message: Message) -> int:
    assert isinstance(message.tag.index, int)
    return message.tag.index
