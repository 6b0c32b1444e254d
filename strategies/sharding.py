"""Who owns and who backs up which slice of the parameters and optimizer state.

ZeRO stage 1 (Rajbhandari et al., SC'20, sec. 5.1), slice by slice of every block, so that a change
of membership moves small intervals and never one worker's whole state. Backups live in another
failure domain wherever there is one: the loss of any single domain leaves every shard readable.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import sub

from runtime.layout import ALIGNMENT, Block, Layout
from runtime.plan import Member, Shard, Stage, WorkerId

EVERYBODY = 64
"""A block is cut over all its holders if they are no more than this. In a larger group a block has about as
many shards, or more where every worker is to have one at all: 12,500 workers that hold 12 layers would
otherwise make 150,000 shards, and every worker 12,500 small messages for each layer."""

LEAST_UNITS = 256
"""In multiples of ``ALIGNMENT``: what a shard of such a group has at least, unless the block is smaller."""


def shard_blocks(layout: Layout, stages: Sequence[Stage], members: Sequence[Member]) -> tuple[Shard, ...]:
    """Cuts every block over all its holders and gives every shard a backup.

    The holders of a block are the stage groups of all layers that use it, so a tied embedding is
    cut over both groups. Bounds are multiples of ``ALIGNMENT`` elements and sizes differ by at
    most one ``ALIGNMENT``; a block with fewer such units than holders has one shard per unit. The
    first holder rotates with the block's index, so small blocks spread over the group. A block of more
    than ``EVERYBODY`` holders is cut over a run of them, which begins where the last block's ended.

    A backup is, in order of preference: another holder in another failure domain, any worker in
    another domain, another holder, any other worker, None for a lone worker; among equals the one
    that backs up the fewest elements so far, then the lowest id. With more than ``EVERYBODY`` holders it
    is the worker half a round on among the most preferred, by domain: nobody has to be compared.

    Returns the shards in order of (block, start). Pure and independent of the order of ``members``.
    """
    workers = sorted({worker for stage in stages for worker in stage.workers})
    domain_of = {member.worker: member.domain for member in members}
    assert all(worker in domain_of for worker in workers), "a stage names a worker that is no member"
    elements_backed_up = dict.fromkeys(workers, 0)
    stage_of_layer = [k for k, stage in enumerate(stages) for _ in range(stage.first, stage.stop)]
    assert len(stage_of_layer) == layout.layers, "the stages must hold every layer once"
    held_by = [tuple(sorted({stage_of_layer[layer] for layer in block.layers})) for block in layout.blocks]
    units: Counter[tuple[int, ...]] = Counter()
    blocks: Counter[tuple[int, ...]] = Counter()
    for block, held in zip(layout.blocks, held_by, strict=True):
        units[held] += block.size // ALIGNMENT
        blocks[held] += 1

    groups: dict[tuple[int, ...], _Group] = {}
    for held in units:
        holders = sorted({worker for k in held for worker in stages[k].workers})
        ring = backup_ring(holders, workers, domain_of) if len(holders) > EVERYBODY else None
        groups[held] = _Group(holders, units[held], _each_owns(len(holders), blocks[held]), ring)
    every_ring = all(group.ring is not None for group in groups.values())

    shards: list[Shard] = []
    for block, held in zip(layout.blocks, held_by, strict=True):
        group = groups[held]
        bounds, owners = _cut(block, *group.run(block))
        backups: list[WorkerId | None]
        if group.ring is not None:
            backups = [group.ring[owner] for owner in owners]
        else:
            pool = _backup_pool(group.holders, workers, domain_of, elements_backed_up)
            sizes = map(sub, bounds[1:], bounds)
            backups = [
                None if pool is None else pool.take(owner, size)
                for owner, size in zip(owners, sizes, strict=True)
            ]
        shards += map(Shard, repeat(block.index), bounds, bounds[1:], owners, backups)
        if not every_ring:
            for start, stop, backup in zip(bounds, bounds[1:], backups, strict=False):
                if backup is not None:
                    elements_backed_up[backup] += stop - start
    return tuple(shards)


@dataclass
class _Group:
    """The holders of some blocks, which have ``units`` multiples of ``ALIGNMENT`` together. In a large
    group everybody owns ``each_owns`` shards, and ``ring`` gives the backup of every owner if it can."""

    holders: Sequence[WorkerId]
    units: int
    each_owns: int
    ring: Mapping[WorkerId, WorkerId] | None
    _units_cut: int = 0
    _next: int = 0

    def run(self, block: Block) -> tuple[int, int, Sequence[WorkerId]]:
        """(the block's shards, place of the first one's owner among the holders, the holders)."""
        units = block.size // ALIGNMENT
        if len(self.holders) <= EVERYBODY:
            return min(len(self.holders), units), block.index, self.holders
        first, before = self._next, self._units_cut
        self._units_cut += units
        # a block's share of all shards, rounded so that the shares add up
        shards = len(self.holders) * self.each_owns
        share = self._units_cut * shards // self.units - before * shards // self.units
        pieces = min(share, units // LEAST_UNITS, len(self.holders))
        pieces = max(pieces, min(1, units))
        self._next += pieces
        return pieces, first, self.holders


def _each_owns(holders: int, blocks: int) -> int:
    """How many shards every worker of a large group owns, so that each of its blocks has ``EVERYBODY``."""
    return max(EVERYBODY * blocks // holders, 1)


def _cut(
    block: Block, pieces: int, first: int, holders: Sequence[WorkerId]
) -> tuple[list[int], list[WorkerId]]:
    """(bounds of the shards, their owners)."""
    assert block.size % ALIGNMENT == 0, f"block {block.name} is not padded to {ALIGNMENT} elements"
    if pieces == 0:
        return [0], []
    smaller, larger_pieces = divmod(block.size // ALIGNMENT, pieces)
    bounds = [(piece * smaller + min(piece, larger_pieces)) * ALIGNMENT for piece in range(pieces + 1)]
    first %= len(holders)
    return bounds, [*holders[first:], *holders[:first]][:pieces]


def backup_ring(
    holders: Sequence[WorkerId], workers: Sequence[WorkerId], domain_of: Mapping[WorkerId, str]
) -> dict[WorkerId, WorkerId] | None:
    """Every holder's backup: the worker half a round on, in order of domain and id. That is another domain's
    worker, and nobody is chosen twice, as long as no domain has more than half of them.

    Over the holders if they span domains, else over all workers if those do, else over the holders. None
    where one domain has too many.
    """
    spanning = [each for each in (holders, workers) if len({domain_of[worker] for worker in each}) > 1]
    for candidates in spanning or [holders]:
        count = len(candidates)
        largest = max(Counter(domain_of[worker] for worker in candidates).values())
        if spanning and largest > count // 2:
            continue
        ring = sorted(candidates, key=lambda worker: (domain_of[worker], worker))
        return dict(zip(ring, [*ring[count // 2 :], *ring[: count // 2]], strict=True))
    return None


class _LeastLoaded:
    """Candidates grouped by a key; hands out the least loaded one of any group but the owner's.

    One heap per group and a heap of the groups' best, so a choice costs O(log n): a block cut 64
    ways over 64 workers must not cost 64 x 64 comparisons while a recovery waits for the plan.
    """

    def __init__(
        self, candidates: Iterable[WorkerId], key: Callable[[WorkerId], Hashable], load: dict[WorkerId, int]
    ) -> None:
        self.key = key
        self.groups: dict[Hashable, list[tuple[int, WorkerId]]] = {}
        for worker in candidates:
            self.groups.setdefault(key(worker), []).append((load[worker], worker))
        for group in self.groups.values():
            heapq.heapify(group)
        self.best = [group[0] for group in self.groups.values()]
        heapq.heapify(self.best)

    def take(self, owner: WorkerId, elements: int) -> WorkerId:
        """Chooses a worker outside the owner's group and adds ``elements`` to its load."""
        own = None
        load, worker = heapq.heappop(self.best)
        if self.key(worker) == self.key(owner):
            own = (load, worker)
            load, worker = heapq.heappop(self.best)
        group = self.groups[self.key(worker)]
        heapq.heapreplace(group, (load + elements, worker))
        heapq.heappush(self.best, group[0])
        if own is not None:
            heapq.heappush(self.best, own)
        return worker


def _backup_pool(
    holders: Sequence[WorkerId],
    workers: Sequence[WorkerId],
    domain_of: dict[WorkerId, str],
    load: dict[WorkerId, int],
) -> _LeastLoaded | None:
    """The most preferred pool that has a candidate for every owner among ``holders``."""
    for candidates in (holders, workers):
        if len({domain_of[worker] for worker in candidates}) > 1:
            return _LeastLoaded(candidates, domain_of.__getitem__, load)
    for candidates in (holders, workers):
        if len(candidates) > 1:
            return _LeastLoaded(candidates, lambda worker: worker, load)
    return None
