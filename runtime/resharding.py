"""From what workers hold to what a plan asks for: disjoint worker-to-worker transfers.

State is known by intervals of blocks, not by rank, so any plan can follow any other: what is missing is
the wanted interval minus what is there, and it comes from whoever holds it (the intersection of old
and new layouts). Nothing here touches a tensor.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from itertools import pairwise
from typing import Literal

from runtime.layout import ALIGNMENT, Layout
from runtime.plan import Keeping, Plan, WorkerId

PIECES = 64
"""Into up to how many pieces a block's parameters are cut, over all targets, where some have the whole block:
pieces of several sources come sooner, but thousands of targets keep all sources busy with one each."""

Interval = tuple[int, int]
"""Elements start to stop - 1 of a block; never empty in a normalised list."""

Content = Literal["parameters", "moments", "state"]
"""What a transfer carries: working parameters, exp_avg and exp_avg_sq, or all three."""

BYTES: Mapping[Content, int] = {"parameters": 4, "moments": 8, "state": 12}
"""Bytes per element moved; all are float32."""


@dataclass(frozen=True, slots=True)
class Holding:
    """A worker holds elements ``start`` to ``stop - 1`` of ``block``: parameters, exp_avg and
    exp_avg_sq as they were after ``version`` completed optimizer steps."""

    block: int
    start: int
    stop: int
    version: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """``source`` sends elements ``start`` to ``stop - 1`` of ``block`` to ``target``."""

    source: WorkerId
    target: WorkerId
    block: int
    start: int
    stop: int
    what: Content

    @property
    def bytes(self) -> int:
        return (self.stop - self.start) * BYTES[self.what]


def normalise(intervals: Iterable[Interval]) -> list[Interval]:
    """Ascending, disjoint, non-adjacent and non-empty intervals that cover the same elements."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def subtract(wanted: Iterable[Interval], present: Iterable[Interval]) -> list[Interval]:
    """The normalised elements of ``wanted`` that are not in ``present``."""
    holes = normalise(present)
    missing: list[Interval] = []
    for start, stop in normalise(wanted):
        for hole_start, hole_stop in holes:
            if hole_stop <= start:
                continue
            if hole_start >= stop:
                break
            if start < hole_start:
                missing.append((start, hole_start))
            start = hole_stop
        if start < stop:
            missing.append((start, stop))
    return missing


def newest_complete_version(layout: Layout, holdings: Mapping[WorkerId, Sequence[Holding]]) -> int | None:
    """The newest version at which all workers together hold every element of every block, or None.

    That is where work goes on after a loss: an older one would repeat steps for nothing, and a newer
    one is lost in part.
    """
    held: dict[int, dict[int, list[Interval]]] = {}
    for sequence in holdings.values():
        for holding in sequence:
            blocks = held.setdefault(holding.version, {})
            blocks.setdefault(holding.block, []).append((holding.start, holding.stop))
    for version in sorted(held, reverse=True):
        blocks = held[version]
        if all(not subtract([(0, block.size)], blocks.get(block.index, ())) for block in layout.blocks):
            return version
    return None


def plan_transfers(
    layout: Layout,
    plan: Plan,
    version: int,
    holdings: Mapping[WorkerId, Sequence[Holding]],
    working: Mapping[WorkerId, Mapping[int, int]],
    *,
    owners_first: bool = False,
) -> tuple[Transfer, ...]:
    """What must move so that ``plan`` can go on from ``version``.

    ``holdings`` and ``working`` (``working[w][block]`` = version of the full parameters in w's
    model) name every worker that can send, members of ``plan`` or not: leave lost ones out.
    Afterwards every owner and backup has its shards' state, and every holder of a block what
    ``plan.keeping`` says of it, given that a worker copies by itself what it has: state pieces at ``version``
    into new shards, the parameters of state it holds into its model, and its model's parameters beside the
    moments that it receives.

    Order: parameters first (only they are waited for before the next forward), then owners' state, then
    backups' (ElasWave moves a layer's parameters before its optimizer state for the same reason);
    inside each by block, target, start. Transfers of one kind to one target are disjoint. Each
    segment comes from the source with the fewest bytes to send so far, then the lowest id; with
    ``owners_first``, of those who hold its state, also where it is of parameters and cut no finer by that.

    Every element must be held at ``version`` by someone (``newest_complete_version`` finds such a
    version); AssertionError where nobody holds a wanted one.
    """
    sources = _Sources(layout, version, holdings, working, owners_first=owners_first)
    owned: dict[tuple[int, WorkerId], list[Interval]] = {}
    backed_up: dict[tuple[int, WorkerId], list[Interval]] = {}
    for shard in plan.shards:
        owned.setdefault((shard.block, shard.owner), []).append((shard.start, shard.stop))
        if shard.backup is not None:
            backed_up.setdefault((shard.block, shard.backup), []).append((shard.start, shard.stop))

    transfers: list[Transfer] = []
    nothing: Mapping[int, int] = {}
    for block in layout.blocks if plan.keeping is not Keeping.NOTHING else ():
        index, whole = block.index, [(0, block.size)] if block.size else []
        targets = [w for w in plan.holders(block.layers) if working.get(w, nothing).get(index) != version]
        most = max(PIECES // max(len(targets), 1), 1)
        sources.weigh(index)
        for target in targets:
            present = sources.local(index, target)
            missing = subtract(whole, present) if present else whole
            transfers += sources.send_parameters(index, target, missing, most)
    holders = [
        set(plan.holders(block.layers)) if plan.keeping is not Keeping.NOTHING else set()
        for block in layout.blocks
    ]
    if plan.keeping is Keeping.STATE:
        replicas = {
            (block.index, w): [(0, block.size)] for block in layout.blocks for w in holders[block.index]
        }
        owned |= replicas
        backed_up = {place: intervals for place, intervals in backed_up.items() if place not in replicas}
    for wanted in (owned, backed_up):
        for (index, target), intervals in sorted(wanted.items()):
            missing = subtract(intervals, sources.local(index, target))
            what: Content = "moments" if target in holders[index] else "state"
            transfers += sources.send(index, target, missing, what)
    return tuple(transfers)


class _Sources:
    """Who has what at one version, and how much each was asked to send."""

    def __init__(
        self,
        layout: Layout,
        version: int,
        holdings: Mapping[WorkerId, Sequence[Holding]],
        working: Mapping[WorkerId, Mapping[int, int]],
        *,
        owners_first: bool,
    ) -> None:
        self._owners_first = owners_first
        self._bytes_to_send = dict.fromkeys({*holdings, *working}, 0)
        self._local: dict[tuple[int, WorkerId], list[Interval]] = {}
        for worker, sequence in holdings.items():
            for holding in sequence:
                if holding.version == version:
                    key = (holding.block, worker)
                    self._local.setdefault(key, []).append((holding.start, holding.stop))
        by_block: dict[int, list[tuple[WorkerId, list[Interval]]]] = {b.index: [] for b in layout.blocks}
        for (block, worker), intervals in sorted(self._local.items()):
            by_block[block].append((worker, normalise(intervals)))
        # Between two neighbouring bounds the set of holders is the same: look it up once per block.
        self._bounds: dict[int, list[int]] = {}
        self._holders: dict[int, list[list[WorkerId]]] = {}
        for block, held in by_block.items():
            bounds = sorted({bound for _, intervals in held for interval in intervals for bound in interval})
            holders: list[list[WorkerId]] = [[] for _ in bounds]
            for worker, intervals in held:
                for start, stop in intervals:
                    for i in range(bisect_left(bounds, start), bisect_left(bounds, stop)):
                        holders[i].append(worker)
            self._bounds[block], self._holders[block] = bounds, holders
        # (bytes to send when last looked at, worker), per block: whoever has all its parameters
        self._full: dict[int, list[tuple[int, WorkerId]]] = {block.index: [] for block in layout.blocks}
        for worker, versions in sorted(working.items()):
            for block, held_version in versions.items():
                if held_version == version:
                    self._full[block].append((0, worker))

    def local(self, block: int, worker: WorkerId) -> Sequence[Interval]:
        """The pieces of state that ``worker`` itself holds at the version."""
        return self._local.get((block, worker), ())

    def weigh(self, block: int) -> None:
        """Looks at how much whoever has all of the block was asked to send: to be called before its
        parameters are sent, or every entry has to be put right one by one."""
        full = [(self._bytes_to_send[worker], worker) for _, worker in self._full[block]]
        heapify(full)
        self._full[block] = full

    def send_parameters(
        self, block: int, target: WorkerId, missing: Sequence[Interval], most: int
    ) -> list[Transfer]:
        """As ``send``, of parameters; in no more than ``most`` pieces and one for each gap, if that is less
        than there are segments, where somebody has the whole block."""
        if not self._full[block] or len(self._bounds[block]) <= most:
            return self.send(block, target, missing, "parameters")
        transfers: list[Transfer] = []
        elements = sum(stop - start for start, stop in missing)
        for start, stop in missing:
            units = -(-(stop - start) // ALIGNMENT)
            pieces = min(max(most * (stop - start) // elements, 1), units)
            cuts = [start + i * units // pieces * ALIGNMENT for i in range(pieces)]
            for piece_start, piece_stop in zip(cuts, [*cuts[1:], stop], strict=True):
                _, source = self._least_loaded(self._full[block])
                self._add(transfers, Transfer(source, target, block, piece_start, piece_stop, "parameters"))
                heapreplace(self._full[block], (self._bytes_to_send[source], source))
        return transfers

    def send(
        self, block: int, target: WorkerId, missing: Iterable[Interval], what: Content
    ) -> list[Transfer]:
        """Cuts ``missing`` where the set of holders changes and gives each segment a source."""
        transfers: list[Transfer] = []
        bounds, holders = self._bounds[block], self._holders[block]
        full = what == "parameters" and bool(self._full[block])
        for start, stop in missing:
            cuts = [start, *bounds[bisect_right(bounds, start) : bisect_left(bounds, stop)], stop]
            for segment_start, segment_stop in pairwise(cuts):
                i = bisect_right(bounds, segment_start) - 1
                least = [(self._bytes_to_send[worker], worker) for worker in (holders[i] if i >= 0 else ())]
                if full and not (least and self._owners_first):
                    least.append(self._least_loaded(self._full[block]))
                assert least, f"nobody holds elements {segment_start}.. of block {block}"
                _, source = min(least)
                self._add(transfers, Transfer(source, target, block, segment_start, segment_stop, what))
        return transfers

    def _add(self, transfers: list[Transfer], new: Transfer) -> None:
        """Appends ``new``, as one with the last transfer where it goes on from that."""
        self._bytes_to_send[new.source] += (new.stop - new.start) * BYTES[new.what]
        last = transfers[-1] if transfers else None
        if last is not None and last.source == new.source and last.stop == new.start:
            transfers[-1] = replace(new, start=last.start)
        else:
            transfers.append(new)

    def _least_loaded(self, heap: list[tuple[int, WorkerId]]) -> tuple[int, WorkerId]:
        """The (bytes to send, worker) of a heap that comes first now. Nobody's bytes ever shrink, so an
        entry that is out of date can only be too far up: it is put right when it comes to the top."""
        while True:
            sent, worker = heap[0]
            if sent == self._bytes_to_send[worker]:
                return heap[0]
            heapreplace(heap, (self._bytes_to_send[worker], worker))
