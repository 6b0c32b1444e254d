"""1F1B: a backward frees activations, so it goes first (Narayanan et al., PipeDream, SOSP'19, sec. 3.2).

Flushed every step. A forward runs while fewer than ``group_limit`` micro-batches are in flight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from strategies.schedules.instructions import Instruction, Offer, Place, Tally, Work
from strategies.schedules.limits import group_limit

BACKWARD_ONLY: Offer = (Instruction(Work.BACKWARD),)
BACKWARD_FIRST: Offer = (*BACKWARD_ONLY, Instruction(Work.FORWARD))


def instructions(place: Place, tallies: Sequence[Tally]) -> Iterator[Offer]:
    """See ``Schedule``. The last stage's limit is 1, its backwards are ready at once, and so every stage
    before it drains too: no order of arrival deadlocks."""
    (tally,) = tallies
    limit = group_limit(place.shape, place.stages[0])
    while not tally.is_finished:
        yield BACKWARD_FIRST if tally.in_flight < limit else BACKWARD_ONLY
