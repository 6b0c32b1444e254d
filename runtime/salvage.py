"""What survives of an interrupted step: gradients that are summed already, and tensors to go on from.

A step is redone under a plan with the same cut. What survivors have finished stays in their exact sums,
which do not depend on order; only what the lost computed is computed again, from boundary tensors that
their senders have kept. (ElasWave, "in-place recovery", redoes from micro-batch boundaries too, but sums
in floating point.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from runtime.plan import Plan, WorkerId
from runtime.samples import Samples

Task = tuple[int, int]
"""(stage, micro-batch): what one worker computes forward and backward."""


class Status(Enum):
    """How far a survivor has come with one micro-batch at one of its stages."""

    FORWARD = "forward"
    """Forward is done, and its activations are held; the gradient of the output has yet to come."""
    BACKWARD = "backward"
    """The gradient of the output is there; what is left of backward goes on by itself."""
    DONE = "done"
    """All gradients are in the sums."""


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """One worker's part of an unfinished ``step``: ``layers``, the first and the one after the last of every
    stage that it holds, and the status of every task that it has something of."""

    step: int
    layers: Mapping[int, tuple[int, int]]
    statuses: Mapping[Task, Status]


ActivationsT = TypeVar("ActivationsT")
GradientsT = TypeVar("GradientsT")
ValueT = TypeVar("ValueT")
LossT = TypeVar("LossT")


@dataclass
class StepProgress(Generic[ActivationsT, GradientsT, ValueT, LossT]):
    """One worker's tasks of one attempt at one step. Outlives plans as long as the step goes on.

    ``keeps`` says whether boundary tensors are kept for others (the worker's own activations are anyway,
    until their backward).
    """

    keeps: bool = True
    step: int = 0
    attempt: int = 0
    layers: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """By stage, as in ``WorkerProgress``."""
    done: set[Task] = field(default_factory=set)
    losses: dict[int, LossT] = field(default_factory=dict)
    """By micro-batch."""
    in_flight: dict[Task, ActivationsT] = field(default_factory=dict)
    paused: dict[Task, GradientsT] = field(default_factory=dict)
    """Backwards that can begin, or were interrupted between layers, with the gradient to go on from."""
    deferred: dict[Task, ActivationsT] = field(default_factory=dict)
    """Layers whose weights' gradients are put off."""
    values: dict[Task, ValueT] = field(default_factory=dict)
    """Outputs that went to the next stage."""
    gradients: dict[Task, GradientsT] = field(default_factory=dict)
    """Gradients that went to the stage before."""
    samples: dict[int, Samples] = field(default_factory=dict)
    """What the micro-batches are made of, as it came with their values."""

    def begin(self, step: int, attempt: int, layers: Mapping[int, tuple[int, int]]) -> None:
        """Forgets everything."""
        self.step, self.attempt, self.layers = step, attempt, layers
        # new ones: what was handed out of the old step may be on its way to others
        self.done, self.losses, self.in_flight, self.deferred = set(), {}, {}, {}
        self.paused, self.values, self.gradients, self.samples = {}, {}, {}, {}

    def status(self, task: Task) -> Status | None:
        if task in self.done:
            return Status.DONE
        if task in self.paused or task in self.deferred:
            return Status.BACKWARD
        return Status.FORWARD if task in self.in_flight else None

    def report(self) -> WorkerProgress | None:
        """What another plan with the same cut can use; None where that is nothing.

        A further attempt has scales that not everybody may know, so only the first one can go on.
        """
        if not self.keeps or self.attempt != 1:
            return None
        known = sorted({*self.done, *self.paused, *self.deferred, *self.in_flight})
        statuses = {task: self.status(task) for task in known}
        return WorkerProgress(
            self.step, self.layers, {task: s for task, s in statuses.items() if s is not None}
        )


def layers_of(plan: Plan, worker: WorkerId) -> dict[int, tuple[int, int]]:
    """``WorkerProgress.layers`` of ``worker`` under ``plan``."""
    return {k: (plan.stages[k].first, plan.stages[k].stop) for k in plan.stages_of(worker)}


@dataclass(frozen=True, slots=True)
class Salvage:
    """What the redone step need not do. ``statuses[k][m]``: the status of micro-batch m at stage k, where the
    worker that the plan assigns it to has one. Only ``contributors`` go on with their sums, others clear
    theirs.
    """

    step: int
    contributors: frozenset[WorkerId]
    statuses: tuple[Mapping[int, Status], ...]

    def status(self, stage: int, micro_batch: int) -> Status | None:
        return self.statuses[stage].get(micro_batch)

    def is_awaited(self, plan: Plan, stage: int, micro_batch: int) -> bool:
        """Whether ``stage`` has something of ``micro_batch`` to give that the stage before or after it lacks;
        else only the stage's own sums do."""
        before, after = plan.before(micro_batch, stage), plan.after(micro_batch, stage)
        gradient = before is not None and self.status(before, micro_batch) in (None, Status.FORWARD)
        return gradient or (after is not None and self.status(after, micro_batch) is None)


def salvage(plan: Plan, step: int, progress: Mapping[WorkerId, WorkerProgress]) -> Salvage:
    """What ``plan`` can use of the survivors' progress in ``step``.

    A worker contributes if it keeps its layers and all its tasks; whoever does not starts the step anew.
    """
    contributors: set[WorkerId] = set()
    statuses: list[dict[int, Status]] = [{} for _ in plan.stages]
    for worker, found in sorted(progress.items()):
        if found.step != step or worker not in plan.workers or found.layers != layers_of(plan, worker):
            continue
        if all(plan.assignment[k][micro_batch] == worker for k, micro_batch in found.statuses):
            contributors.add(worker)
            for (k, micro_batch), status in found.statuses.items():
                statuses[k][micro_batch] = status
    return Salvage(step, frozenset(contributors), tuple(statuses))


def kept(plan: Plan, found: Salvage | None) -> float:
    """The share of the step's work that need not be done again: layers x micro-batches that are finished."""
    if found is None:
        return 0.0
    layers = [stage.stop - stage.first for stage in plan.stages]
    finished = (
        layers[k] * sum(status is Status.DONE for status in statuses.values())
        for k, statuses in enumerate(found.statuses)
    )
    whole = (
        sum(layers[k] for k in range(len(layers)) if plan.passes(m, k)) for m in range(plan.micro_batches)
    )
    return sum(finished) / sum(whole)


def remaining(plan: Plan, found: Salvage) -> dict[WorkerId, dict[int, int]]:
    """How many micro-batches every worker has yet to finish, by stage."""
    left = {worker: dict.fromkeys(plan.stages_of(worker), 0) for worker in plan.workers}
    for k, row in enumerate(plan.assignment):
        for micro_batch, worker in enumerate(row):
            if plan.passes(micro_batch, k):
                left[worker][k] += found.status(k, micro_batch) is not Status.DONE
    return left
