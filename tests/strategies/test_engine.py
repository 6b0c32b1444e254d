"""DeepSpeed's division of work and state, worked out beforehand: nothing twice, nothing left out."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from runtime.layout import Layout
from runtime.plan import Member, Plan, WorkerId
from runtime.resharding import Holding, newest_complete_version, plan_transfers
from runtime.speeds import Speeds
from strategies.engine import (
    FLAT_ALIGNMENT,
    EngineSettings,
    engine_plan_chooser,
    parameter_groups,
    partition,
    rounds,
    turns,
)
from strategies.model import describe


def settings(stage: int, own_optimizer: bool = False, alignment: int = 1) -> EngineSettings:
    return EngineSettings("{}", stage, own_optimizer, own_optimizer, alignment)


widths = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def layout_of(sizes: list[int]) -> Layout:
    """One linear layer each, and a table that the first and the last share."""
    layers: list[nn.Module] = [nn.Linear(size, size + 1) for size in sizes]
    first, last = nn.Embedding(7, 3), nn.Linear(3, 7)
    last.weight = first.weight
    return describe([first, *layers, last])


@given(st.integers(1, 20), st.integers(1, 9))
def test_every_micro_batch_counts_once_whoever_is_there(micro_batches: int, ranks: int) -> None:
    ranks = min(ranks, micro_batches)
    passes = rounds(micro_batches, ranks)
    shares: Counter[int] = Counter()
    for rank in range(ranks):
        mine = [m for m in range(micro_batches) if m % ranks == rank]
        part = turns(mine, micro_batches, ranks)
        assert len(part) == passes, "all ranks make the same collectives"
        for turn in part:
            # what DeepSpeed does to a loss: divided by the accumulation steps, averaged over the ranks
            if turn.weight:
                shares[turn.micro_batch] += 1
                assert math.isclose(turn.weight / passes / ranks, 1 / micro_batches)
    assert shares == dict.fromkeys(range(micro_batches), 1)


@given(widths, st.integers(1, 6), st.booleans(), st.sampled_from([1, 4]))
def test_flat_partitions_are_deepspeeds(sizes: list[int], ranks: int, own: bool, alignment: int) -> None:
    """Against the rule element by element: flatten, pad, cut into equal parts."""
    layout = layout_of(sizes)
    owners: dict[int, list[int]] = {}
    for group in parameter_groups(layout, own):
        flat: list[tuple[int, int] | None] = []
        for index in group:
            flat += [None] * (-len(flat) % alignment)
            flat += [(index, element) for element in range(layout.tensors[index].size)]
        flat += [None] * (-len(flat) % (FLAT_ALIGNMENT * ranks))
        part = Fraction(len(flat), ranks)
        for place, entry in enumerate(flat):
            if entry is not None:
                owners.setdefault(entry[0], []).append(int(place / part))
    for stage in (1, 2):
        assert owners_of(layout, partition(layout, settings(stage, own, alignment), ranks)) == owners


@given(widths, st.integers(1, 6))
def test_own_partitions_are_deepspeeds(sizes: list[int], ranks: int) -> None:
    layout = layout_of(sizes)
    owners = {
        tensor.index: [element // -(-tensor.size // ranks) for element in range(tensor.size)]
        for tensor in layout.tensors
    }
    assert owners_of(layout, partition(layout, settings(3), ranks)) == owners


def owners_of(layout: Layout, cuts: list[list[tuple[int, int, int]]]) -> dict[int, list[int]]:
    """The rank of every element of every tensor. Every block is covered once, in order."""
    owners: dict[int, list[int]] = {}
    for block, pieces in zip(layout.blocks, cuts, strict=True):
        assert [start for start, _, _ in pieces] == [0, *(stop for _, stop, _ in pieces[:-1])]
        assert pieces[-1][1] == block.size
        assert all(one[2] != other[2] for one, other in pairwise(pieces))
        ranks = [rank for start, stop, rank in pieces for _ in range(start, stop)]
        owners |= {tensor.index: ranks[tensor.offset : tensor.stop] for tensor in block.tensors}
    return owners


@given(widths, st.integers(2, 6), st.integers(0, 3), st.integers(1, 3), st.data())
def test_state_is_the_same_after_any_domain_is_lost(
    sizes: list[int], workers: int, stage: int, domains: int, data: st.DataObject
) -> None:
    """Every element of every version that somebody owned comes out of the survivors' memory, bit for bit."""
    layout = layout_of(sizes)
    choose = engine_plan_chooser(layout, 8, settings(stage))
    placed = {w: data.draw(st.integers(0, domains - 1), label=f"domain of {w}") for w in range(workers)}
    members = [Member(w, str(domain)) for w, domain in placed.items()]
    old = choose(1, members, Speeds(), None)
    several = len(set(placed.values())) > 1
    lost_domain = data.draw(st.sampled_from(sorted(set(placed.values()))), label="lost")
    lost = {w for w, d in placed.items() if d == lost_domain} if several else {0}
    whole = {block.index: torch.randn(block.size) for block in layout.blocks}
    kept = {
        worker: {
            (shard.block, shard.start, shard.stop): whole[shard.block][shard.start : shard.stop]
            for shard in old.shards
            if worker in (shard.owner, shard.backup)
        }
        for worker in old.workers
        if worker not in lost
    }
    holdings = {w: [Holding(*piece, 5) for piece in pieces] for w, pieces in kept.items()}
    assert newest_complete_version(layout, holdings) == 5
    new = choose(2, [member for member in members if member.worker not in lost], Speeds(), old)
    moved = moved_state(layout, new, holdings, kept)
    for shard in new.shards:
        assert shard.backup != shard.owner
        state = moved[shard.owner][shard.block][shard.start : shard.stop]
        assert torch.equal(state, whole[shard.block][shard.start : shard.stop])
    assert sorted(m for worker in new.workers for m in new.micro_batches_of(worker)) == list(range(8))


def moved_state(
    layout: Layout,
    plan: Plan,
    holdings: dict[WorkerId, list[Holding]],
    kept: dict[WorkerId, dict[tuple[int, int, int], Tensor]],
) -> dict[WorkerId, dict[int, Tensor]]:
    """What every worker has of every block after the transfers; NaN where it has nothing."""
    state = {
        w: {block.index: torch.full((block.size,), float("nan")) for block in layout.blocks} for w in kept
    }
    for worker, pieces in kept.items():
        for (block, start, stop), values in pieces.items():
            state[worker][block][start:stop] = values
    before = {w: {block: values.clone() for block, values in blocks.items()} for w, blocks in state.items()}
    for transfer in plan_transfers(layout, plan, 5, holdings, {}):
        place = slice(transfer.start, transfer.stop)
        state[transfer.target][transfer.block][place] = before[transfer.source][transfer.block][place]
    return state
