"""A worker's pass where teams compute micro-batches together: one leads, the others do as it says.

The first member of a team follows the schedule as if it were alone, and tells the others of everything
that it does, in that order. Every member holds its own slices: it keeps their activations, and sends them on
to those who hold them at the next stage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from runtime.fabric.interface import Message, Tag
from runtime.plan import WorkerId
from runtime.salvage import Salvage, Task
from runtime.samples import Samples
from runtime.spans import BACKWARD
from strategies.boundary import Value, flatten, unflatten
from strategies.salvage import Losses, StepProgress
from strategies.schedules.instructions import Work
from strategies.sequence.division import dealt
from strategies.sequence.exchange import Exchange
from strategies.sequence.stage import SequenceStage, Sliced
from strategies.stage import Gradients
from strategies.training_pass import TrainingPass

if TYPE_CHECKING:
    from strategies.pipeline import Pipeline


class TeamPass(TrainingPass):
    """See ``TrainingPass``. What is interrupted is done again: other teams hold other slices."""

    def __init__(
        self,
        pipeline: Pipeline,
        progress: StepProgress,
        exponents: Sequence[int] | None,
        salvage: Salvage | None,
    ) -> None:
        assert salvage is None, "a team's step is not gone on with"
        super().__init__(pipeline, progress, exponents, salvage)
        stage = pipeline.stage
        assert isinstance(stage, SequenceStage)
        self._sequence = stage
        self._team = self._plan.team_of(pipeline.worker)
        place = self._team.index(pipeline.worker)
        self._others = self._team[1:] if place == 0 else ()
        tag = self._channel("all-to-all")
        self._exchange = Exchange(stage.slices, self._team, place, pipeline.endpoint, tag, pipeline.wait_for)
        self._orders = 0

    def run(self) -> Losses:
        """See ``TrainingPass``; losses are the lead's."""
        with self._sequence.together(self._exchange):
            if self._pipeline.worker == self._team[0]:
                losses = super().run()
                self._order(None)
                return losses
            while self._obey():
                self._pipeline.between()
        return {}

    # --- lead and followers -----------------------------------------------------------------

    def _order(self, note: Any, parts: Mapping[WorkerId, Sequence[Tensor]] | None = None) -> None:
        """Tells the others what is done now."""
        tag = self._channel("order", self._orders)
        self._orders += 1
        for worker in self._others:
            self._pipeline.endpoint.send(worker, tag, parts[worker] if parts else (), note)

    def _obey(self) -> bool:
        """Does what the lead does, with this worker's slices; False when there is no more to do."""
        message = self._pipeline.wait_for(self._team[0], self._channel("order", self._orders))
        self._orders += 1
        if message.note is None:
            return False
        name, k, micro_batch, sender, samples, specs = message.note
        work, task = Work(name), (k, micro_batch)
        if work is Work.FORWARD:
            value = (
                unflatten(message.tensors, specs[self._pipeline.worker])
                if sender is None
                else self._value(task, sender)
            )
            super()._forward(task, value, samples)
        elif work is Work.WEIGHT_GRADIENT:
            super()._weight_gradients(task)
        else:
            if sender is not None:
                self._progress.paused[task] = self._gradients(task, sender)
            super()._backward(task, work)
        return True

    def _take(self, message: Message, work: Work) -> None:
        assert isinstance(message.tag.index, tuple), "pipeline messages are indexed by stage and micro-batch"
        k, micro_batch = message.tag.index
        task, sender = (k, micro_batch), message.sender
        if work is Work.FORWARD:
            samples = message.note[1]
            self._order((work.value, *task, sender, samples, None))
            super()._forward(task, self._value(task, sender, message), samples)
        else:
            self._order((work.value, *task, sender, (), None))
            self._progress.paused[task] = self._gradients(task, sender, message)
            super()._backward(task, work)

    def _forward(self, task: Task, value: Value, samples: Samples) -> None:
        """Of a micro-batch that begins here: all of its slices are there."""
        slices = [self._exchange.slices_of(place) for place in range(len(self._team))]
        dealt_out = [flatten({each: value[each] for each in theirs}) for theirs in slices]
        specs = {worker: spec for worker, (_, spec) in zip(self._team, dealt_out, strict=True)}
        parts = {worker: tensors for worker, (tensors, _) in zip(self._team, dealt_out, strict=True)}
        self._order((Work.FORWARD.value, *task, None, samples, specs), parts)
        super()._forward(task, {each: value[each] for each in self._exchange.own}, samples)

    def _backward(self, task: Task, work: Work) -> None:
        """Of a micro-batch whose loss was computed here."""
        self._order((work.value, *task, None, (), None))
        super()._backward(task, work)

    def _weight_gradients(self, task: Task) -> None:
        self._order((Work.WEIGHT_GRADIENT.value, *task, None, (), None))
        super()._weight_gradients(task)

    def _targets(self, task: Task) -> Value:
        """The lead alone reads them."""
        return super()._targets(task) if self._pipeline.worker == self._team[0] else None

    def _loss(self, task: Task, value: Sliced, targets: Value) -> None:
        """Every member has the loss of its slices; the lead adds them up."""
        endpoint, micro_batch = self._pipeline.endpoint, task[1]
        there, back = self._channel("targets", micro_batch), self._channel("losses", micro_batch)
        lead = self._team[0]
        if self._pipeline.worker == lead:
            slices = self._sequence.split_targets(targets)
            for place, worker in enumerate(self._team[1:], 1):
                theirs = self._exchange.slices_of(place)
                endpoint.send(worker, there, *flatten(slices[theirs.start : theirs.stop]))
            mine = slices[: len(self._exchange.own)]
        else:
            message = self._pipeline.wait_for(lead, there)
            mine = unflatten(message.tensors, message.note)
        began = time.perf_counter_ns()
        losses, gradients = self._sequence.losses_of(value, mine, train=True)
        self._pipeline.spans.add(BACKWARD, began, micro_batch)
        self._progress.paused[task] = gradients
        if self._pipeline.worker != lead:
            endpoint.send(lead, back, note=losses)
            return
        for worker in self._team[1:]:
            losses += self._pipeline.wait_for(worker, back).note
        self._progress.losses[micro_batch] = (
            math.fsum(loss for loss, _ in losses),
            sum(n for _, n in losses),
        )

    # --- from and to the stages beside ------------------------------------------------------

    def _value(self, task: Task, sender: WorkerId, first: Message | None = None) -> Sliced:
        """This worker's slices, from those of ``sender``'s team who have any of them."""
        found: Sliced = {}
        for message in self._parts(Work.FORWARD, task, sender, first):
            found.update(unflatten(message.tensors, message.note[0]))
        return found

    def _gradients(self, task: Task, sender: WorkerId, first: Message | None = None) -> Gradients:
        by_slice: dict[int, Gradients] = {}
        for message in self._parts(Work.BACKWARD, task, sender, first):
            by_slice.update(unflatten(message.tensors, message.note))
        return [gradient for each in self._exchange.own for gradient in by_slice[each]]

    def _parts(self, work: Work, task: Task, sender: WorkerId, first: Message | None) -> list[Message]:
        team, own = self._plan.team_of(sender), self._exchange.own
        tag = self._tag(work, task[0])._replace(index=task)
        return [
            first if first is not None and first.sender == worker else self._pipeline.wait_for(worker, tag)
            for worker, theirs in zip(team, dealt(self._sequence.slices, len(team)), strict=True)
            if _both(own, theirs)
        ]

    def _send_value(self, stage: int, micro_batch: int, value: Sliced, samples: Samples) -> None:
        for worker, theirs in self._holders(stage, micro_batch):
            tensors, spec = flatten({each: value[each] for each in theirs})
            tag = self._tag(Work.FORWARD, stage)._replace(index=(stage, micro_batch))
            self._pipeline.endpoint.send(worker, tag, tensors, (spec, samples))

    def _send_gradients(self, stage: int, micro_batch: int, gradients: Gradients) -> None:
        own = self._exchange.own
        width = len(gradients) // len(own)
        by_slice = {each: gradients[place * width : (place + 1) * width] for place, each in enumerate(own)}
        for worker, theirs in self._holders(stage, micro_batch):
            tag = self._tag(Work.BACKWARD, stage)._replace(index=(stage, micro_batch))
            self._pipeline.endpoint.send(worker, tag, *flatten({each: by_slice[each] for each in theirs}))

    def _holders(self, stage: int, micro_batch: int) -> list[tuple[WorkerId, range]]:
        """Who has which of this worker's slices of a micro-batch at a stage."""
        team = self._plan.team_of(self._plan.assignment[stage][micro_batch])
        runs = dealt(self._sequence.slices, len(team))
        shared = ((worker, _both(self._exchange.own, run)) for worker, run in zip(team, runs, strict=True))
        return [(worker, both) for worker, both in shared if both]

    def _channel(self, what: str, index: int = 0) -> Tag:
        return Tag(self._plan.generation, self._progress.step, self._progress.attempt, what, index)


def _both(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
