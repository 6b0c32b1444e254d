"""A simulated worker's pass of micro-batches; the twin of ``strategies.pipeline``."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from runtime.fabric.interface import Message, Tag
from runtime.plan import Plan
from runtime.salvage import Salvage, Status, StepProgress, Task
from runtime.simulation.process import Waits
from runtime.simulation.toy import sample

if TYPE_CHECKING:
    from runtime.simulation.step import SimStep


Layer = tuple[int, int, int]
"""(layer, its input, the gradient of its output): what a simulated layer keeps."""

SimProgress = StepProgress[list[Layer], int, int, int]


class SimPipeline:
    """One worker's part in the passes of one plan."""

    def __init__(self, step: SimStep, plan: Plan) -> None:
        self._step, self.plan = step, plan
        self.worker, self.endpoint, self.stage = step.worker, step.endpoint, step.stage
        self.me = step.me
        self._splits = step.worker.job.split_backward

    def train(self, progress: SimProgress, salvage: Salvage | None) -> Waits[dict[int, int]]:
        """Forward and backward of this worker's micro-batches, backward first. The real one's schedules only
        choose among the orders that are possible here; weight gradients that are put off come last."""
        step = progress.step
        stages = self.plan.stages_of(self.me)
        tasks = [(k, m) for k in stages for m in self.plan.micro_batches_of(self.me, k)]
        tags = [self._tag(progress, what, k) for what in ("backward", "forward") for k in stages]
        if salvage is not None:
            self._send_again(progress, salvage)
            for task in sorted(progress.paused):
                yield from self._backward(progress, task, 0, salvage)
        to_start = deque(task for task in tasks if task[0] == 0 and progress.status(task) is None)
        early: dict[Task, int] = {}  # gradients of micro-batches that only this stage has to do again
        while len(progress.done) < len(tasks):
            yield from self._step.take_what_came(step - 1)
            message = self.endpoint.poll_any(tags)
            if message is None and not to_start:
                if progress.deferred:
                    yield from self._weight_gradients(progress, min(progress.deferred))
                    continue
                message = yield from self.endpoint.receive_any(tags)
            if message is not None and message.tag.what.startswith("backward"):
                task, gradient = _task(message), message.note
                if task not in progress.in_flight:
                    early[task] = gradient
                    continue
            else:
                task = to_start.popleft() if message is None else _task(message)
                value = sample(step, task[1]) if message is None else message.note
                yield from self.worker.fault("forward")
                value = yield from self._forward(progress, task, value)
                following = self.plan.after(task[1], task[0])
                if following is not None:
                    if progress.keeps:
                        progress.values[task] = value
                    if _status(salvage, following, task[1]) is None:
                        self._send(progress, "forward", following, task[1], value)
                    if task in early:
                        gradient = early.pop(task)
                        yield from self._backward(progress, task, gradient, salvage)
                    continue
                progress.losses[task[1]] = self.worker.model.loss(value)
                gradient = value
            yield from self._backward(progress, task, gradient, salvage)
        return dict(progress.losses)

    def _forward(self, progress: SimProgress, task: Task, value: int) -> Waits[int]:
        stage = self.plan.stages[task[0]]
        yield from self.worker.compute(stage.first, stage.stop, "forward")
        kept = []
        for layer in range(stage.first, stage.stop):
            kept.append((layer, value, 0))
            value = self.worker.model.forward(layer, value, self.stage.working)
        progress.in_flight[task] = kept
        return value

    def _backward(
        self, progress: SimProgress, task: Task, gradient: int, salvage: Salvage | None
    ) -> Waits[None]:
        """From ``gradient`` of the output, or from where an interrupt left it. An interrupt shows before the
        first of the layers that are left, or in their middle."""
        yield from self.worker.fault("backward")
        gradient = progress.paused.setdefault(task, gradient)
        kept = progress.in_flight[task]
        while kept:
            count = -(-len(kept) // 2)
            yield from self.worker.compute(kept[-count][0], kept[-1][0] + 1, "backward")
            for _ in range(count):
                layer, value, _ = kept.pop()
                if self._splits:
                    progress.deferred.setdefault(task, []).append((layer, value, gradient))
                gradient, parts = self.worker.model.backward(layer, value, gradient, self.stage.working)
                if not self._splits:
                    self._add(parts)
            progress.paused[task] = gradient
        del progress.in_flight[task], progress.paused[task]
        if task not in progress.deferred:
            progress.done.add(task)
        before = self.plan.before(task[1], task[0])
        if before is None:
            return
        if progress.keeps:
            progress.gradients[task] = gradient
        if _status(salvage, before, task[1]) in (None, Status.FORWARD):
            self._send(progress, "backward", before, task[1], gradient)

    def _weight_gradients(self, progress: SimProgress, task: Task) -> Waits[None]:
        """Layer by layer, with an interrupt between any two."""
        deferred = progress.deferred[task]
        while deferred:
            layer = deferred[-1][0]
            yield from self.worker.compute(layer, layer + 1, "backward")
            self._add(self.worker.model.backward(*deferred.pop(), self.stage.working)[1])
        del progress.deferred[task]
        progress.done.add(task)

    def _add(self, parts: Mapping[int, int]) -> None:
        for block, part in parts.items():
            self.stage.accumulators[block] += part

    def _send_again(self, progress: SimProgress, salvage: Salvage) -> None:
        """What went to workers that are lost, or was dropped with the old generation."""
        for (k, micro_batch), value in sorted(progress.values.items()):
            following = self.plan.after(micro_batch, k)
            if following is not None and salvage.status(following, micro_batch) is None:
                self._send(progress, "forward", following, micro_batch, value)
        for (k, micro_batch), gradient in sorted(progress.gradients.items()):
            before = self.plan.before(micro_batch, k)
            if before is not None and salvage.status(before, micro_batch) in (None, Status.FORWARD):
                self._send(progress, "backward", before, micro_batch, gradient)

    def _tag(self, progress: SimProgress, what: str, stage: int) -> Tag:
        return Tag(self.plan.generation, progress.step, progress.attempt, f"{what} {stage}")

    def _send(self, progress: SimProgress, what: str, stage: int, micro_batch: int, note: int) -> None:
        to = self.plan.assignment[stage][micro_batch]
        tag = self._tag(progress, what, stage)._replace(index=(stage, micro_batch))
        self.endpoint.send(to, tag, note)


def _status(salvage: Salvage | None, stage: int, micro_batch: int) -> Status | None:
    return None if salvage is None else salvage.status(stage, micro_batch)


def _task(message: Message) -> Task:
    assert isinstance(message.tag.index, tuple)
    stage, micro_batch = message.tag.index
    return stage, micro_batch
