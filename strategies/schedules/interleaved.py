"""Interleaved 1F1B: every worker holds several chunks of layers (Narayanan et al., "Efficient Large-Scale
Language Model Training on GPU Clusters", SC'21, sec. 2.2.2).

With V chunks a worker the fill and the drain are V times as short: (K - 1) / V forwards and backwards of a
worker's layers. That takes V times the messages, and more activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from strategies.schedules.instructions import Instruction, Offer, Place, Tally, Work
from strategies.schedules.limits import group_limit


def instructions(place: Place, tallies: Sequence[Tally]) -> Iterator[Offer]:
    """See ``Schedule``.

    Where every lane of workers is a pipeline of its own, and its micro-batches divide by the groups, in the
    very order of the paper: a worker that did something else because a message is a moment late would
    keep others waiting. Elsewhere whatever is there first.
    """
    groups = len(place.shape) // len(tallies)
    once = groups - 1 - place.stages[0]
    warm_up = 2 * once + (len(tallies) - 1) * groups if len(tallies) > 1 else once
    if place.in_lanes and tallies[0].total % groups == 0:
        return _in_order(groups, warm_up, tallies)
    limits = [group_limit(place.shape, stage) for stage in place.stages]
    return _as_it_comes(groups, max(warm_up + 1, limits[0]), limits, tallies)


def _in_order(groups: int, warm_up: int, tallies: Sequence[Tally]) -> Iterator[Offer]:
    chunks = len(tallies)
    total = sum(tally.total for tally in tallies)
    while True:
        forwards = backwards = 0
        for tally in tallies:
            forwards += tally.started
            backwards += tally.started - tally.in_flight
        if backwards == total:
            return
        if forwards < min(total, warm_up + 1 + backwards):
            yield (Instruction(Work.FORWARD, forwards // groups % chunks),)
        else:
            yield (Instruction(Work.BACKWARD, chunks - 1 - backwards // groups % chunks),)


def _as_it_comes(groups: int, most: int, limits: Sequence[int], tallies: Sequence[Tally]) -> Iterator[Offer]:
    """Backwards first; chunks in the paper's order of preference, each with its stage's limit under 1F1B.

    ``most``: with so many in flight in all chunks, the first takes no more. Of all forwards that wait, look
    at those of the last stage that has any: what is in flight from there on can go backward, so there is room
    for them in the end, and nothing deadlocks.
    """
    chunks = range(len(tallies))
    while not all(tally.is_finished for tally in tallies):
        held = sum(tally.in_flight for tally in tallies)
        returned = [tally.started - tally.in_flight for tally in tallies]
        back = sorted(chunks, key=lambda chunk: (returned[chunk] // groups, -chunk))
        forth = sorted(chunks, key=lambda chunk: (tallies[chunk].started // groups, chunk))
        yield (
            *(Instruction(Work.BACKWARD, chunk) for chunk in back),
            *(
                Instruction(Work.FORWARD, chunk)
                for chunk in forth
                if tallies[chunk].in_flight < limits[chunk] and (chunk > 0 or held < most)
            ),
        )
