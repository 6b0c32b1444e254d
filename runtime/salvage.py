"""What survives of an interrupted step: gradients that are summed already, and tensors to go on from.

A step is redone under a plan with the same cut. What survivors have finished stays in their exact sums,
which do not depend on order; only what the lost computed is computed again, from boundary tensors that
their senders have kept. (ElasWave, "in-place recovery", redoes from micro-batch boundaries too, but sums
in floating point.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from runtime.plan import Plan, WorkerId


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
