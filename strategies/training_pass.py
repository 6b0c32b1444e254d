"""Forward and backward of one worker's micro-batches in one attempt at a step, in the order of its schedule.

Driven by messages: a worker does the first thing on offer whose input has come (``schedules.instructions``).
In a step that is gone on with, what another stage waits for goes before what only this one has to do again:
so the others are kept busy, and the rest fills the gaps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from runtime.fabric.interface import Message, Tag
from runtime.salvage import Salvage, Status, Task
from runtime.samples import Samples
from runtime.spans import BACKWARD, FORWARD
from runtime.time_slices import long_slices
from strategies.boundary import Value, flatten, unflatten
from strategies.reading import Side, Wanted, announce
from strategies.salvage import Losses, StepProgress
from strategies.schedules.instructions import Instruction, Offer, Place, Tally, Work
from strategies.stage import Gradients

if TYPE_CHECKING:
    from strategies.pipeline import Pipeline


class TrainingPass:
    """``progress`` names the step and the attempt, and takes in what becomes of every task; where
    ``salvage`` is given the step goes on from what was reached under an earlier plan."""

    def __init__(
        self,
        pipeline: Pipeline,
        progress: StepProgress,
        exponents: Sequence[int] | None,
        salvage: Salvage | None,
    ) -> None:
        self._pipeline, self._plan, self._stage = pipeline, pipeline.plan, pipeline.stage
        self._progress, self._exponents, self._salvage = progress, exponents, salvage
        self._keeps = progress.keeps and not self._plan.teams  # a step of teams is not gone on with
        self._place = Place.of(pipeline.plan, pipeline.worker, anew=salvage is None)
        self._stages = self._place.stages
        self._last = len(self._plan.stages) - 1
        self._early: dict[Task, Gradients] = {}
        """Of micro-batches that only this stage has to do again."""
        self._to_start: deque[int] = deque()
        self._tallies: list[Tally] = []
        for k in self._stages:
            tasks = [(k, m) for m in self._plan.micro_batches_of(pipeline.worker, k)]
            reached = [status for task in tasks if (status := progress.status(task)) is not None]
            self._tallies.append(
                Tally(
                    total=len(tasks),
                    started=len(reached),
                    in_flight=sum(task in progress.in_flight for task in tasks),
                    deferred=sum(self._is_deferred(task) for task in tasks),
                )
            )
            if k == 0:
                to_start = [m for k, m in tasks if progress.status((k, m)) is None]
                self._to_start.extend(sorted(to_start, key=lambda m: (not self._is_awaited(0, m), m)))

    def run(self) -> Losses:
        """The losses of the micro-batches that this worker finished (last stage only).

        Raises Interrupted when the membership changes meanwhile.
        """
        pipeline, progress = self._pipeline, self._progress
        if self._salvage is not None:
            self._send_again(self._salvage)
        read_at = ((Side.INPUTS, 0), (Side.TARGETS, self._last))
        reached = {*progress.done, *progress.deferred, *progress.in_flight}
        started = {(side, m) for side, k in read_at for stage, m in reached if stage == k}
        announce(pipeline.data, self._plan, pipeline.worker, progress.step, started)
        for offer in pipeline.schedule(self._place, self._tallies):
            pipeline.between()
            self._do_one(offer)
        return progress.losses

    def _do_one(self, offer: Offer) -> None:
        """The first thing on offer that can be done now, or else the first whose input comes."""
        coming: dict[Tag, Work] = {}
        for instruction in offer:
            work, chunk = instruction
            if not self._tallies[chunk].allows(work):
                continue
            if not self._is_ready(instruction):
                coming.update(dict.fromkeys(self._tags(work, self._stages[chunk]), work))
                continue
            message = self._pipeline.endpoint.poll_any(coming) if coming else None
            if message is None:
                self._start(instruction)
                return
            break
        else:
            assert coming, f"the schedule offers nothing that could be done: {offer}"
            message = self._pipeline.wait(coming)
        self._take(message, coming[message.tag._replace(index=0)])

    def _is_ready(self, instruction: Instruction) -> bool:
        """Whether it needs no message."""
        k = self._stages[instruction.chunk]
        if instruction.work is Work.FORWARD:
            return k == 0
        if instruction.work is Work.WEIGHT_GRADIENT:
            return True
        return any(stage == k for stage, _ in self._progress.paused)

    def _start(self, instruction: Instruction) -> None:
        work, chunk = instruction
        progress, k = self._progress, self._stages[chunk]
        if work is Work.FORWARD:
            micro_batch = self._to_start.popleft()
            wanted = Wanted(Side.INPUTS, progress.step, micro_batch)
            value, samples = self._pipeline.read(wanted)
            self._forward((k, micro_batch), self._stage.split(value), samples)
        elif work is Work.WEIGHT_GRADIENT:
            tasks = (task for task in progress.deferred if task[0] == k and self._is_deferred(task))
            self._weight_gradients(min(tasks))
        else:
            self._backward(min(task for task in progress.paused if task[0] == k), work)

    def _take(self, message: Message, work: Work) -> None:
        assert isinstance(message.tag.index, tuple), "pipeline messages are indexed by stage and micro-batch"
        k, micro_batch = message.tag.index
        task = (k, micro_batch)
        if work is Work.FORWARD:
            self._forward(task, *_unpack_value(message))
        elif task in self._progress.in_flight:
            self._progress.paused[task] = _unpack_gradients(message)
            self._backward(task, work)
        else:
            self._early[task] = _unpack_gradients(message)

    def _forward(self, task: Task, value: Value, samples: Samples) -> None:
        pipeline, progress = self._pipeline, self._progress
        k, micro_batch = task
        chunk = self._stages.index(k)
        progress.samples[micro_batch] = samples
        following = self._plan.after(micro_batch, k)
        # read before anything is in flight: an interrupt while they are waited for leaves nothing half done
        targets = self._targets(task) if following is None else None
        pipeline.fault("forward", progress.step, micro_batch)
        with self._computing(FORWARD, micro_batch):
            value, progress.in_flight[task] = self._stage.forward(
                progress.step, micro_batch, value, train=True, check=pipeline.check, stage=chunk
            )
        self._tallies[chunk].add(Work.FORWARD)
        if following is not None:
            if self._keeps:
                progress.values[task] = value
            if self._status(following, micro_batch) is None:
                self._send_value(following, micro_batch, value, samples)
            if task in self._early:
                progress.paused[task] = self._early.pop(task)
            return
        self._loss(task, value, targets)

    def _loss(self, task: Task, value: Value, targets: Value) -> None:
        """The loss of what came out of the last stage, and with it the begin of backward."""
        with self._computing(BACKWARD, task[1]):
            loss, count, gradients = self._stage.loss_of(value, targets, train=True)
        self._progress.losses[task[1]] = (loss, count)
        self._progress.paused[task] = gradients

    def _targets(self, task: Task) -> Value:
        progress, micro_batch = self._progress, task[1]
        targets, theirs = self._pipeline.read(Wanted(Side.TARGETS, progress.step, micro_batch))
        if theirs != progress.samples[micro_batch]:
            raise ValueError(
                f"step {progress.step}: the inputs of micro-batch {micro_batch} are of other samples than "
                "its targets: the data must be equal, and pure functions of their place, on all workers"
            )
        return targets

    def _backward(self, task: Task, work: Work) -> None:
        """From the gradient of the output, or from where an interrupt left it, to that of the input."""
        pipeline, progress = self._pipeline, self._progress
        k, micro_batch = task
        pipeline.fault("backward", progress.step, micro_batch)
        split = work is Work.INPUT_GRADIENT
        # all emptied and overwritten layer by layer: an interrupt leaves what backward goes on from
        gradients = progress.paused[task]
        with self._computing(BACKWARD, micro_batch):
            self._stage.backward(
                progress.step,
                micro_batch,
                progress.in_flight[task],
                gradients,
                self._exponents,
                check=pipeline.check,
                deferred=progress.deferred.setdefault(task, []) if split else None,
            )
        del progress.in_flight[task], progress.paused[task]
        if not split:
            progress.done.add(task)
        self._tallies[self._stages.index(k)].add(work)
        before = self._plan.before(micro_batch, k)
        if before is None:
            return
        if self._keeps:
            progress.gradients[task] = gradients
        if self._status(before, micro_batch) in (None, Status.FORWARD):
            self._send_gradients(before, micro_batch, gradients)

    def _is_deferred(self, task: Task) -> bool:
        """Whether nothing but weight gradients is left of it."""
        return task in self._progress.deferred and task not in self._progress.in_flight

    def _weight_gradients(self, task: Task) -> None:
        deferred = self._progress.deferred[task]
        with self._computing(BACKWARD, task[1]):
            self._stage.weight_gradients(deferred, self._exponents, check=self._pipeline.check)
        del self._progress.deferred[task]
        self._progress.done.add(task)
        self._tallies[self._stages.index(task[0])].add(Work.WEIGHT_GRADIENT)

    @contextmanager
    def _computing(self, what: int, micro_batch: int) -> Iterator[None]:
        """A span of the timeline, of work that waits for nobody, but in a team: there the members of a layer
        wait for each other. One that is interrupted is not recorded."""
        began = time.perf_counter_ns()
        with nullcontext() if self._plan.teams else long_slices():
            yield
        self._pipeline.spans.add(what, began, micro_batch)

    # --- messages ---------------------------------------------------------------------------

    def _status(self, stage: int, micro_batch: int) -> Status | None:
        return None if self._salvage is None else self._salvage.status(stage, micro_batch)

    def _is_awaited(self, stage: int, micro_batch: int) -> bool:
        return self._salvage is None or self._salvage.is_awaited(self._plan, stage, micro_batch)

    def _send_again(self, salvage: Salvage) -> None:
        """What went to workers that are lost, or was dropped with the old generation."""
        progress = self._progress
        for (k, micro_batch), value in sorted(progress.values.items(), key=lambda item: item[0]):
            following = self._plan.after(micro_batch, k)
            assert following is not None, "what went on went to somebody"
            if salvage.status(following, micro_batch) is None:
                self._send_value(following, micro_batch, value, progress.samples[micro_batch])
        for (k, micro_batch), gradients in sorted(progress.gradients.items(), key=lambda item: item[0]):
            before = self._plan.before(micro_batch, k)
            assert before is not None, "what went back went to somebody"
            if salvage.status(before, micro_batch) in (None, Status.FORWARD):
                self._send_gradients(before, micro_batch, gradients)

    def _tags(self, work: Work, stage: int) -> tuple[Tag, ...]:
        """The channels on which the input of ``work`` at ``stage`` comes, the more urgent one first."""
        tag = self._tag(work, stage)
        if work is Work.FORWARD and self._salvage is not None:
            return tag, self._tag(work, stage, awaited=False)
        return (tag,)

    def _tag(self, work: Work, stage: int, *, awaited: bool = True) -> Tag:
        what = "backward" if work is not Work.FORWARD else "forward" if awaited else "forward again"
        return Tag(self._plan.generation, self._progress.step, self._progress.attempt, f"{what} {stage}")

    def _send_value(self, stage: int, micro_batch: int, value: Value, samples: Samples) -> None:
        tensors, spec = flatten(value)
        tag = self._tag(Work.FORWARD, stage, awaited=self._is_awaited(stage, micro_batch))
        self._send(tag, stage, micro_batch, tensors, (spec, samples))

    def _send_gradients(self, stage: int, micro_batch: int, gradients: Gradients) -> None:
        flowing = [gradient is not None for gradient in gradients]
        tensors = [gradient for gradient in gradients if gradient is not None]
        self._send(self._tag(Work.BACKWARD, stage), stage, micro_batch, tensors, flowing)

    def _send(self, tag: Tag, stage: int, micro_batch: int, tensors: list[Tensor], note: Any) -> None:
        to = self._plan.assignment[stage][micro_batch]
        self._pipeline.endpoint.send(to, tag._replace(index=(stage, micro_batch)), tensors, note)


def _unpack_value(message: Message) -> tuple[Value, Samples]:
    spec, samples = message.note
    return unflatten(message.tensors, spec), samples


def _unpack_gradients(message: Message) -> Gradients:
    tensors: Any = iter(message.tensors)
    return [next(tensors) if flows else None for flows in message.note]
