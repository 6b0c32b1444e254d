"""GPipe: all forwards, then all backwards (Huang et al., "GPipe", NeurIPS'19, sec. 2.3).

Every micro-batch's activations are kept at once, which recomputation (``precision.recompute``) makes
affordable. The bubble is (K - 1) / (M + K - 1) for K stages and M micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from strategies.schedules.instructions import Instruction, Offer, Place, Tally, Work


def instructions(place: Place, tallies: Sequence[Tally]) -> Iterator[Offer]:
    """See ``Schedule``. A forward needs nothing of a backward: no order of arrival deadlocks."""
    (tally,) = tallies
    while tally.started < tally.total:
        yield (Instruction(Work.FORWARD),)
    while not tally.is_finished:
        yield (Instruction(Work.BACKWARD),)
