"""The preemption trace, and from committed steps to shares of the ideal. Pure, and the same for every system.

Places are what a cloud lends: each holds one worker. The trace empties the places in turn, one every
``kill_every`` seconds, and gives each back ``newcomer_after`` seconds later; what a newcomer then needs to
start, warm up and join is the system's own affair and counts as lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Change:
    """``at`` is in seconds since the window's begin; a place is emptied, or given back."""

    at: float
    place: int
    given_back: bool


@dataclass(frozen=True, slots=True)
class Step:
    """A committed step. ``at`` in seconds since 1970; ``samples`` are those of its gradient, to which
    ``workers`` contributed.
    """

    number: int
    at: float
    samples: int
    workers: int


@dataclass(frozen=True, slots=True)
class Account:
    """What a window of ``window`` seconds brought.

    ``rate``: samples per second while all places were there. ``at_batch``: samples of the committed steps
    of the intended batch; ``committed``: of all of them. ``lent``: the mean number of places lent, as a share
    of all; ``at_work``: the mean number of workers that made each second's step, likewise. A newcomer is lent
    at once, and at work when it has joined. ``longest_gap``: seconds between two commits of whatever batch.
    """

    window: float
    rate: float
    at_batch: int
    committed: int
    lent: float
    at_work: float
    longest_gap: float

    @property
    def goodput(self) -> float:
        """Samples at the intended batch over the ideal: ``rate`` for every second of every place lent."""
        return self.at_batch / (self.rate * self.window * self.lent)

    @property
    def generous(self) -> float:
        """As ``goodput``, with the samples of smaller batches."""
        return self.committed / (self.rate * self.window * self.lent)

    @property
    def of_full_strength(self) -> float:
        """Samples at the intended batch over what all places would have brought, had none been taken
        away. At most ``lent``.
        """
        return self.at_batch / (self.rate * self.window)


def trace(places: int, window: float, kill_every: float, newcomer_after: float) -> tuple[Change, ...]:
    """The changes inside ``window`` seconds, ascending in time; place 0 goes first.

    Raises ValueError if a place's turn would come while it is empty.
    """
    if newcomer_after >= places * kill_every:
        raise ValueError(
            f"a place that comes back after {newcomer_after:g} s is still empty when its turn comes again, "
            f"after {places * kill_every:g} s: take more places, or kill less often"
        )
    changes = []
    kills = 0
    while (at := (kills + 1) * kill_every) < window:
        changes.append(Change(at, kills % places, given_back=False))
        if at + newcomer_after < window:
            changes.append(Change(at + newcomer_after, kills % places, given_back=True))
        kills += 1
    return tuple(sorted(changes, key=lambda change: (change.at, change.given_back)))


def calls(changes: Sequence[Change], boot_seconds: float) -> list[tuple[float, Change]]:
    """When each change must be called for to happen in time, ascending: a place that is given back takes
    ``boot_seconds`` until it is there.
    """
    moments = [(change.at - boot_seconds if change.given_back else change.at, change) for change in changes]
    return sorted(moments, key=lambda each: each[0])


def place_seconds(changes: Sequence[Change], places: int, window: float) -> float:
    """How long each of the places was there, summed over all of them."""
    lost = sum(window - change.at for change in changes if not change.given_back)
    return places * window - lost + sum(window - change.at for change in changes if change.given_back)


def final(steps: Sequence[Step]) -> list[Step]:
    """Each step once, the last time it was committed: what was rolled back and done again counts
    when it was there to stay. Ascending in time.
    """
    by_number: dict[int, Step] = {}
    for step in steps:
        earlier = by_number.get(step.number)
        if earlier is None or step.at > earlier.at:
            by_number[step.number] = step
    return sorted(by_number.values(), key=lambda step: step.at)


def account(
    steps: Sequence[Step],
    changes: Sequence[Change],
    *,
    begin: float,
    window: float,
    places: int,
    batch: int,
    undisturbed: Sequence[Step] | None = None,
) -> Account:
    """What the ``window`` seconds from ``begin`` on (a commit at full strength) brought.

    ``steps`` may hold a step more than once (see ``final``); ``changes`` are those that happened, in the
    harness's own time. ``undisturbed``: the steps as they were known at the first change, where ``steps`` no
    longer holds what was rolled back since. Raises ValueError if fewer than three steps of the whole
    ``batch`` were committed before the first change: the rate would be guesswork.
    """
    kept = final(steps)
    first = min((change.at for change in changes), default=window)
    # also of what was rolled back later: the rate was what it was
    known = steps if undisturbed is None else undisturbed
    before = final([step for step in known if begin <= step.at <= begin + first])
    calm = [step.at for step in before if step.samples == batch]
    if len(calm) < 3:
        raise ValueError(
            f"only {len(calm)} whole batches were committed in the {first:.1f} s before the first kill: "
            "make a step shorter or kill later"
        )
    inside = [step for step in kept if begin < step.at <= begin + window]
    begins = [begin, *(step.at for step in inside)]
    worked = sum((step.at - at) * step.workers for at, step in zip(begins, inside, strict=False))
    moments = [begin, *sorted(step.at for step in steps if begin < step.at <= begin + window), begin + window]
    return Account(
        window=window,
        rate=batch * (len(calm) - 1) / (calm[-1] - calm[0]),
        at_batch=sum(step.samples for step in inside if step.samples == batch),
        committed=sum(step.samples for step in inside),
        lent=place_seconds(changes, places, window) / (places * window),
        at_work=worked / (places * window),
        longest_gap=max(later - earlier for earlier, later in pairwise(moments)),
    )
