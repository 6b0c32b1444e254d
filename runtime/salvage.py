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


class Status(Enum):
    """How far a survivor has come with one micro-batch at its stage."""

    FORWARD = "forward"
    """Forward is done, and its activations are held; the gradient of the output has yet to come."""
    BACKWARD = "backward"
    """Backward was interrupted between two layers; it goes on by itself."""
    DONE = "done"
    """All gradients are in the sums."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One worker's part of an unfinished step: ``step``, its layers ``first`` to ``stop - 1``, and the status
    of every micro-batch that it has something of."""

    step: int
    first: int
    stop: int
    statuses: Mapping[int, Status]


ActivationsT = TypeVar("ActivationsT")
GradientsT = TypeVar("GradientsT")
ValueT = TypeVar("ValueT")
LossT = TypeVar("LossT")


@dataclass
class StepProgress(Generic[ActivationsT, GradientsT, ValueT, LossT]):
    """One worker's micro-batches of one attempt at one step. Outlives plans as long as the step goes on.

    ``keeps`` says whether boundary tensors are kept for others (the worker's own activations are anyway,
    until their backward).
    """

    keeps: bool = True
    step: int = 0
    attempt: int = 0
    layers: tuple[int, int] = (0, 0)
    done: set[int] = field(default_factory=set)
    losses: dict[int, LossT] = field(default_factory=dict)
    in_flight: dict[int, ActivationsT] = field(default_factory=dict)
    paused: dict[int, GradientsT] = field(default_factory=dict)
    """Backwards that were interrupted between layers, with the gradient that goes on."""
    values: dict[int, ValueT] = field(default_factory=dict)
    """Outputs that went to the next stage."""
    gradients: dict[int, GradientsT] = field(default_factory=dict)
    """Gradients that went to the stage before."""
    samples: dict[int, Samples] = field(default_factory=dict)
    """What the micro-batches are made of, as it came with their values."""

    def begin(self, step: int, attempt: int, layers: tuple[int, int]) -> None:
        """Forgets everything."""
        self.step, self.attempt, self.layers = step, attempt, layers
        # new ones: what was handed out of the old step may be on its way to others
        self.done, self.losses, self.in_flight = set(), {}, {}
        self.paused, self.values, self.gradients, self.samples = {}, {}, {}, {}

    def status(self, micro_batch: int) -> Status | None:
        if micro_batch in self.done:
            return Status.DONE
        if micro_batch in self.paused:
            return Status.BACKWARD
        return Status.FORWARD if micro_batch in self.in_flight else None

    def report(self) -> Progress | None:
        """What another plan with the same cut can use; None where that is nothing.

        A further attempt has scales that not everybody may know, so only the first one can go on.
        """
        if not self.keeps or self.attempt != 1:
            return None
        known = sorted({*self.done, *self.paused, *self.in_flight})
        statuses = {micro_batch: self.status(micro_batch) for micro_batch in known}
        first, stop = self.layers
        return Progress(self.step, first, stop, {m: s for m, s in statuses.items() if s is not None})


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


def salvage(plan: Plan, step: int, progress: Mapping[WorkerId, Progress]) -> Salvage:
    """What ``plan`` can use of the survivors' progress in ``step``.

    A worker contributes if it keeps its layers and all its micro-batches; whoever does not starts the step
    anew.
    """
    contributors: set[WorkerId] = set()
    statuses: list[dict[int, Status]] = [{} for _ in plan.stages]
    for worker, found in sorted(progress.items()):
        if found.step != step or worker not in plan.workers:
            continue
        k = plan.stage_of(worker)
        stage = plan.stages[k]
        keeps_layers = (stage.first, stage.stop) == (found.first, found.stop)
        if keeps_layers and set(found.statuses) <= set(plan.micro_batches_of(worker)):
            contributors.add(worker)
            statuses[k].update(found.statuses)
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
    return sum(finished) / (sum(layers) * plan.micro_batches)


def remaining(plan: Plan, found: Salvage) -> dict[WorkerId, int]:
    """How many micro-batches every worker has yet to finish."""
    left = dict.fromkeys(plan.workers, 0)
    for k, row in enumerate(plan.assignment):
        for micro_batch, worker in enumerate(row):
            left[worker] += found.status(k, micro_batch) is not Status.DONE
    return left
