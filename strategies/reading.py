"""What a stage reads of the data: the first one inputs, the last one targets, each with its samples.

``micro_batch`` is all that a data set must have (``strategies.pipeline.Data``). One that also has ``inputs``
and ``targets`` (each ``(step, micro-batch) -> Read``) spares whoever needs one side the other, and says which
samples it used; one that has ``expect`` is told ahead what will be read, and one that has ``heed`` how it can
look, while it waits for others, whether its reader has been interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import Enum
from typing import Any, NamedTuple

from runtime.plan import Plan, WorkerId
from runtime.samples import Read

AHEAD = 2
"""Steps that are told ahead at least, the one under way among them."""

READS_AHEAD = 64
"""Reads that are told ahead, of more steps than these where a step has few."""


class Side(Enum):
    """Half of a micro-batch: what goes into the first layer, or what the loss compares with."""

    INPUTS = "inputs"
    TARGETS = "targets"


class Wanted(NamedTuple):
    """One read of a data set."""

    side: Side
    step: int
    micro_batch: int


def read(data: Any, wanted: Wanted) -> Read:
    """What ``data`` says; without samples where it cannot tell them."""
    side, step, micro_batch = wanted
    alone = getattr(data, side.value, None)
    if alone is not None:
        found: Read = alone(step, micro_batch)
        return found
    inputs, targets = data.micro_batch(step, micro_batch)
    return Read(inputs if side is Side.INPUTS else targets, ())


def heed(data: Any, check: Callable[[], None]) -> None:
    """Has ``data`` call ``check`` while a read waits, if it is one that waits; reads then raise what that
    raises."""
    if hasattr(data, "heed"):
        data.heed(check)


def announce(
    data: Any, plan: Plan, worker: WorkerId, step: int, started: Collection[tuple[Side, int]] = ()
) -> None:
    """Tells ``data`` what this worker will read of ``step`` and those after it, in order, if it wants to
    know. ``started``: what of ``step`` has been read already."""
    expect = getattr(data, "expect", None)
    if expect is None:
        return
    read_at = ((Side.INPUTS, plan.assignment[0]), (Side.TARGETS, plan.assignment[-1]))
    of_step = [
        (side, micro_batch)
        for micro_batch in range(plan.micro_batches)
        for side, workers in read_at
        if workers[micro_batch] == worker
    ]
    steps = max(AHEAD, -(-READS_AHEAD // max(1, len(of_step))))
    expect(
        [
            Wanted(side, each, micro_batch)
            for each in range(step, step + steps)
            for side, micro_batch in of_step
            if each > step or (side, micro_batch) not in started
        ]
    )
