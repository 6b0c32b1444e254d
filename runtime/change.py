"""A planned change of membership or of the division of work: what moves, and the account of it.

A change takes place at a step boundary, so what everybody holds then follows from the old plan alone:
the transfers are planned while the step is still under way.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from runtime.layout import Layout
from runtime.plan import Keeping, Plan, WorkerId
from runtime.protocol import Change, Entry, Resume
from runtime.resharding import Holding, Transfer, plan_transfers

BOUNDARY = 0
"""Stands for the boundary's version, which is not known when the transfers are planned."""


def boundary_transfers(layout: Layout, old: Plan, new: Plan) -> tuple[Transfer, ...]:
    """What must move from ``old`` to ``new`` at a step boundary.

    Only those who compute it count as sources of state: the copies of the step just committed are still on
    their way to the backups, and are not sent at all where a change follows. Parameters come from them too
    where they can: they have them before they have gathered those of others, and send them then.
    """
    holdings: dict[WorkerId, list[Holding]] = {worker: [] for worker in old.workers}
    working: dict[WorkerId, dict[int, int]] = {worker: {} for worker in old.workers}
    for block in layout.blocks:
        for worker in old.holders(block.layers) if old.keeping is not Keeping.NOTHING else ():
            working[worker][block.index] = BOUNDARY
    for shard in old.shards:
        having = {shard.owner}
        if old.keeping is Keeping.STATE:
            having.update(old.holders(layout.blocks[shard.block].layers))
        for worker in having:
            holdings[worker].append(Holding(shard.block, shard.start, shard.stop, BOUNDARY))
    return plan_transfers(layout, new, BOUNDARY, holdings, working, owners_first=True)


def at_boundary(change: Change, entry: Entry) -> Resume:
    """A planned change, once it is known where it takes place."""
    return Resume(
        plan=change.plan,
        version=entry.version,
        source="peers",
        addresses=change.addresses,
        transfers=change.transfers,
        exponents=entry.exponents,
        stop_at=change.stop_at,
        record=entry.record,
    )


def same_work(one: Plan, other: Plan) -> bool:
    """Whether two plans differ in nothing but their generation."""
    return replace(one, generation=0) == replace(other, generation=0)


@dataclass
class PlannedChange:
    """The account of one change, from the order until everybody is under way and has what it is owed."""

    old: Plan
    new: Plan
    reason: str
    gain: float = 0.0
    begun: bool = False
    pause: float = 0.0
    moved_bytes: int = 0
    _moving: set[WorkerId] = field(default_factory=set)
    _owed: set[WorkerId] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._moving = set(self.new.workers)
        self._owed = set(self.new.workers)

    @property
    def joining(self) -> tuple[WorkerId, ...]:
        return tuple(worker for worker in self.new.workers if worker not in self.old.workers)

    @property
    def leaving(self) -> tuple[WorkerId, ...]:
        return tuple(worker for worker in self.old.workers if worker not in self.new.workers)

    @property
    def concerned(self) -> tuple[WorkerId, ...]:
        """Everybody who has to know, ascending."""
        return tuple(sorted({*self.old.workers, *self.new.workers}))

    def moved(self, worker: WorkerId, seconds: float, bytes_received: int) -> None:
        """``worker`` follows the new plan; it stood still for ``seconds`` at the boundary."""
        self.begun = True
        self._moving.discard(worker)
        self.moved_bytes += bytes_received
        if worker in self.old.workers:  # a newcomer's wait holds up nobody
            self.pause = max(self.pause, seconds)

    def settled(self, worker: WorkerId) -> None:
        self._owed.discard(worker)

    @property
    def owed(self) -> set[WorkerId]:
        """Who has not yet said that it has all of its state."""
        return set(self._owed)

    @property
    def over(self) -> bool:
        """Everybody is under way, and nobody needs those who leave any more."""
        return not self._moving and not self._owed
