"""Who owns and who backs up which slice of the parameters and optimizer state.

ZeRO stage 1 (Rajbhandari et al., SC'20, sec. 5.1), slice by slice of every block, so that a change
of membership moves small intervals and never one worker's whole state. Backups live in another
failure domain wherever there is one: the loss of any single domain leaves every shard readable.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Sequence

from runtime.layout import ALIGNMENT, Block, Layout
from runtime.plan import Member, Shard, Stage, WorkerId


def shard_blocks(layout: Layout, stages: Sequence[Stage], members: Sequence[Member]) -> tuple[Shard, ...]:
    """Cuts every block over all its holders and gives every shard a backup.

    The holders of a block are the stage groups of all layers that use it, so a tied embedding is
    cut over both groups. Bounds are multiples of ``ALIGNMENT`` elements and sizes differ by at
    most one ``ALIGNMENT``; a block with fewer such units than holders has one shard per unit. The
    first holder rotates with the block's index, so small blocks spread over the group.

    A backup is, in order of preference: another holder in another failure domain, any worker in
    another domain, another holder, any other worker, None for a lone worker; among equals the one
    that backs up the fewest elements so far, then the lowest id.

    Returns the shards in order of (block, start). Pure and independent of the order of ``members``.
    """
    workers = sorted(worker for stage in stages for worker in stage.workers)
    domain_of = {member.worker: member.domain for member in members}
    assert all(worker in domain_of for worker in workers), "a stage names a worker that is no member"
    elements_backed_up = dict.fromkeys(workers, 0)
    stage_of_layer = [stage for stage in stages for _ in range(stage.first, stage.stop)]
    assert len(stage_of_layer) == layout.layers, "the stages must hold every layer once"

    shards: list[Shard] = []
    for block in layout.blocks:
        holders = sorted({w for layer in block.layers for w in stage_of_layer[layer].workers})
        pool = _backup_pool(holders, workers, domain_of, elements_backed_up)
        for start, stop, owner in _cut(block, holders):
            backup = None if pool is None else pool.take(owner, stop - start)
            if backup is not None:
                elements_backed_up[backup] += stop - start
            shards.append(Shard(block.index, start, stop, owner, backup))
    return tuple(shards)


def _cut(block: Block, holders: Sequence[WorkerId]) -> Iterable[tuple[int, int, WorkerId]]:
    assert block.size % ALIGNMENT == 0, f"block {block.name} is not padded to {ALIGNMENT} elements"
    units = block.size // ALIGNMENT
    if units == 0:
        return
    pieces = min(len(holders), units)
    smaller, larger_pieces = divmod(units, pieces)
    start = 0
    for piece in range(pieces):
        stop = start + (smaller + (piece < larger_pieces)) * ALIGNMENT
        yield start, stop, holders[(piece + block.index) % len(holders)]
        start = stop


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
