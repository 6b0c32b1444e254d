"""ZB-H1: a backward in two parts, of which the second fills gaps (Qi et al., "Zero Bubble Pipeline
Parallelism", ICLR'24, sec. 2.1).

The stage before waits for the gradient of the input only; the weights' wait until nothing else can be done.
With forward F, input gradient B and weight gradient W the bubble is (K - 1) (F + B - W) instead of
(K - 1) (F + B + W), and no worker keeps more activations than the first stage does under 1F1B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from strategies.schedules.instructions import Instruction, Offer, Place, Tally, Work
from strategies.schedules.limits import group_limit

FULL: Offer = (Instruction(Work.INPUT_GRADIENT), Instruction(Work.WEIGHT_GRADIENT))
WITH_ROOM: Offer = (Instruction(Work.FORWARD), *FULL)
"""A forward first: after a backward, weight gradients would fill the gap in which the next forward comes."""


def instructions(place: Place, tallies: Sequence[Tally]) -> Iterator[Offer]:
    """See ``Schedule``. Weight gradients wait for nobody, so it deadlocks no more than 1F1B does."""
    (tally,) = tallies
    (stage,) = place.stages
    limit, first = group_limit(place.shape, stage), group_limit(place.shape, 0)
    most = max(limit, first * place.shape[0][0] // place.shape[stage][0])
    while not tally.is_finished:
        yield WITH_ROOM if tally.in_flight < limit and tally.held < most else FULL
