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

INPUT = Instruction(Work.INPUT_GRADIENT)
WEIGHT = Instruction(Work.WEIGHT_GRADIENT)
START: Offer = (Instruction(Work.FORWARD), INPUT)


def instructions(place: Place, tallies: Sequence[Tally]) -> Iterator[Offer]:
    """See ``Schedule``.

    Weight gradients go first where memory is full, and fill gaps only beyond those that memory has room for:
    a worker that took one whenever a message is a moment late would keep all before it waiting. They wait for
    nobody, and else the rule is 1F1B's, so it deadlocks no more than that does.
    """
    (tally,) = tallies
    (stage,) = place.stages
    limit, first = group_limit(place.shape, stage), group_limit(place.shape, 0)
    most = max(limit, first * place.shape[0][0] // place.shape[stage][0])
    while not tally.is_finished:
        more = tally.started < tally.total
        if more and tally.deferred and tally.held >= most:
            yield (WEIGHT,)
        elif more and tally.in_flight < limit:
            yield START
        elif tally.in_flight and tally.deferred <= most - limit:
            yield (INPUT,)
        else:
            yield INPUT, WEIGHT
