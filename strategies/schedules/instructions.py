"""What a schedule says, and what it knows: typed instructions for one worker, from counts of micro-batches.

Exact sums make every order of micro-batches give the same bits, so a schedule is a matter of speed and
memory only. It needs no global clock: a worker does the first thing on offer whose input has arrived, and
where nothing has it waits for whichever comes first. So unequal groups, slow workers and losses need no
schedules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from runtime.plan import Plan, WorkerId


class Work(Enum):
    """What a worker does with one micro-batch at one of its stages."""

    FORWARD = "forward"
    BACKWARD = "backward"
    """Gradients of the stage's input and of its parameters together."""
    INPUT_GRADIENT = "input gradient"
    """The part of a backward that the stage before waits for."""
    WEIGHT_GRADIENT = "weight gradient"
    """The rest, which nobody waits for before the end of the step."""

    __hash__ = object.__hash__  # Enum's own is a call of Python code, of which a simulation makes thousands


class Instruction(NamedTuple):
    """``work`` for the next micro-batch of the worker's ``chunk``-th stage (from 0, first layers first)."""

    work: Work
    chunk: int = 0


Offer = tuple[Instruction, ...]
"""In order of preference; the idle rule is to wait for whichever can be done first."""


@dataclass(slots=True)
class Tally:
    """One chunk of one worker, in micro-batches. Whoever follows the schedule keeps it up to date."""

    total: int
    """That the plan deals to the worker."""
    started: int = 0
    """Forward is done."""
    in_flight: int = 0
    """Forward is done, and the input's gradient is not."""
    deferred: int = 0
    """The input's gradient is done, and the weights' are not."""

    @property
    def held(self) -> int:
        """Whose activations the worker keeps."""
        return self.in_flight + self.deferred

    @property
    def is_finished(self) -> bool:
        return self.started == self.total and not self.held

    def allows(self, work: Work) -> bool:
        """Whether there is, or will be, a micro-batch for ``work``."""
        if work is Work.FORWARD:
            return self.started < self.total
        return self.deferred > 0 if work is Work.WEIGHT_GRADIENT else self.in_flight > 0

    def add(self, work: Work) -> None:
        """One more micro-batch has had ``work`` done."""
        if work is Work.FORWARD:
            self.started += 1
            self.in_flight += 1
        elif work is Work.WEIGHT_GRADIENT:
            self.deferred -= 1
        else:
            self.in_flight -= 1
            self.deferred += work is Work.INPUT_GRADIENT


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker stands: ``shape`` has every stage's (layers, workers; a team counts as one),
    ``stages`` are its own, ascending, one for each chunk.

    ``in_lanes``: micro-batches that meet anywhere are together at every stage, and all of them begin anew.
    ``workers``: of all stages together.
    """

    shape: tuple[tuple[int, int], ...]
    stages: tuple[int, ...]
    in_lanes: bool
    workers: int

    @classmethod
    def of(cls, plan: Plan, worker: WorkerId, *, anew: bool = True) -> Place:
        """``anew``: nothing of the step is done."""
        shape = tuple(
            (stage.stop - stage.first, len(plan.teams_at(k))) for k, stage in enumerate(plan.stages)
        )
        lanes = len(set(zip(*plan.assignment, strict=True)))
        apart = all(len(set(row)) == lanes for row in plan.assignment)
        in_lanes = anew and apart and not plan.paths
        return cls(shape, plan.stages_of(worker), in_lanes, len(plan.workers))


Schedule = Callable[[Place, Sequence[Tally]], Iterator[Offer]]
"""A generator of what is on offer for one worker, until its tallies (one a chunk) are finished. They change
between two offers; it keeps no counts of its own, so a step that was interrupted goes on anywhere."""


def backward_first(work: Sequence[Work], chunks: int) -> Offer:
    """Every kind of ``work`` in turn, the last chunk (nearest to the loss) first."""
    return tuple(Instruction(each, chunk) for each in work for chunk in reversed(range(chunks)))
