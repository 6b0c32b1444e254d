"""SkipPipe: micro-batches on paths of their own over part of the stages (Blagoev et al., 2025).

The plan says who takes which path (``Plan.paths``, found by ``strategies.skippipe.search``). Without paths,
or where nothing is skipped and nothing reordered, this is a 1F1B with several stages a worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from strategies.schedules.instructions import Offer, Place, Tally, Work, backward_first

SLACK = 1.5
"""How many times the micro-batches that would keep all workers busy are in flight. Paths meet at some stages
and leave others alone for a while: simulated with 4 of 6 stages and 24 micro-batches, a step of theirs takes
0.89 of a full one's time without slack and 0.73 with it, and no worker keeps more than the first of 1F1B."""


def instructions(place: Place, tallies: Sequence[Tally]) -> Iterator[Offer]:
    """See ``Schedule``.

    Backwards first, then forwards, those of later stages first. What has begun is never refused: two
    micro-batches that pass two stages in opposite orders could wait for each other's room there. Only stage 0
    holds back what has not begun, so everything in flight comes home, and nothing deadlocks.
    """
    chunks = len(tallies)
    first = place.shape[0][1]
    most = 1 if place.workers == first else ceil(SLACK * place.workers / first)
    while not all(tally.is_finished for tally in tallies):
        yield (
            *backward_first((Work.BACKWARD,), chunks),
            *(
                forward
                for forward in backward_first((Work.FORWARD,), chunks)
                if place.stages[forward.chunk] > 0 or tallies[forward.chunk].in_flight < most
            ),
        )
