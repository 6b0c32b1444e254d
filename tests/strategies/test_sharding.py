"""Shards cover every block once, at aligned bounds, with backups where a lost domain cannot reach."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.layout import ALIGNMENT, Block, Layout
from runtime.plan import Member, Shard, Stage
from strategies.sharding import EVERYBODY, LEAST_UNITS, shard_blocks

Case = tuple[Layout, list[Stage], list[Member]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layers = draw(st.integers(1, 6))
    stage_count = draw(st.integers(1, layers))
    bounds = [0, *sorted(draw(st.permutations(range(1, layers)))[: stage_count - 1]), layers]
    groups = draw(st.lists(st.integers(1, 4), min_size=stage_count, max_size=stage_count))
    names = draw(st.permutations(range(100, 100 + sum(groups))))
    stages, taken = [], 0
    for k, size in enumerate(groups):
        stages.append(Stage(bounds[k], bounds[k + 1], tuple(sorted(names[taken : taken + size]))))
        taken += size
    members = [Member(worker, draw(st.sampled_from(["a", "b", "c"]))) for worker in names]
    units = draw(st.lists(st.integers(1, 9), min_size=layers, max_size=layers))
    blocks = [Block(i, f"layer{i}", (i,), (), units[i] * ALIGNMENT) for i in range(layers)]
    if layers > 1 and draw(st.booleans()):
        blocks.append(Block(layers, "tied", (0, layers - 1), (), draw(st.integers(1, 9)) * ALIGNMENT))
    return Layout(layers, tuple(blocks), ()), stages, members


def holders(stages: list[Stage], block: Block) -> set[int]:
    return {w for s in stages for w in s.workers if any(s.first <= layer < s.stop for layer in block.layers)}


@given(cases())
@settings(max_examples=200)
def test_blocks_are_covered_once_evenly_and_aligned(case: Case) -> None:
    layout, stages, members = case
    shards = shard_blocks(layout, stages, members)
    assert [(s.block, s.start) for s in shards] == sorted((s.block, s.start) for s in shards)
    for block in layout.blocks:
        own = [shard for shard in shards if shard.block == block.index]
        assert own[0].start == 0 and own[-1].stop == block.size
        assert all(left.stop == right.start for left, right in pairwise(own))
        assert all(shard.start % ALIGNMENT == 0 and shard.size > 0 for shard in own)
        assert max(s.size for s in own) - min(s.size for s in own) <= ALIGNMENT
        owners = [shard.owner for shard in own]
        assert len(set(owners)) == len(owners) == min(len(holders(stages, block)), block.size // ALIGNMENT)
        assert set(owners) <= holders(stages, block)


@given(cases())
@settings(max_examples=200)
def test_backups_follow_the_order_of_preference(case: Case) -> None:
    layout, stages, members = case
    domain = {member.worker: member.domain for member in members}
    for shard in shard_blocks(layout, stages, members):
        held_by = holders(stages, layout.blocks[shard.block]) - {shard.owner}
        preferred: list[set[int | None]] = [
            {w for w in held_by if domain[w] != domain[shard.owner]},
            {w for w in domain if domain[w] != domain[shard.owner]},
            {*held_by},
            {w for w in domain if w != shard.owner},
            {None},
        ]
        # Where the holders span domains every owner has a candidate in the first set, and so on.
        assert shard.backup in next(candidates for candidates in preferred if candidates)


@given(cases(), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_the_order_of_members_does_not_matter(case: Case, random: Random) -> None:
    layout, stages, members = case
    shuffled = list(members)
    random.shuffle(shuffled)
    assert shard_blocks(layout, stages, shuffled) == shard_blocks(layout, stages, members)


def test_backups_are_balanced_in_elements() -> None:
    layout = Layout(12, tuple(Block(i, f"layer{i}", (i,), (), 8 * ALIGNMENT) for i in range(12)), ())
    members = [Member(worker, f"node{worker // 2}") for worker in range(4)]
    shards = shard_blocks(layout, [Stage(0, 12, (0, 1, 2, 3))], members)
    backed_up = [sum(s.size for s in shards if s.backup == worker) for worker in range(4)]
    assert backed_up == [24 * ALIGNMENT] * 4


def test_backups_of_one_block_are_balanced_too() -> None:
    layout = Layout(1, (Block(0, "layer0", (0,), (), 8 * ALIGNMENT),), ())
    members = [Member(worker, f"node{worker // 2}") for worker in range(4)]
    shards = shard_blocks(layout, [Stage(0, 1, (0, 1, 2, 3))], members)
    assert [shard.backup for shard in shards] == [2, 3, 0, 1]


def test_tiny_blocks_spread_over_the_group() -> None:
    layout = Layout(3, tuple(Block(i, f"layer{i}", (i,), (), ALIGNMENT) for i in range(3)), ())
    members = [Member(worker, "node") for worker in range(3)]
    shards = shard_blocks(layout, [Stage(0, 3, (0, 1, 2))], members)
    assert [shard.owner for shard in shards] == [0, 1, 2]
    assert all(shard.backup not in (None, shard.owner) for shard in shards)


def test_a_lone_worker_has_no_backup() -> None:
    layout = Layout(1, (Block(0, "layer0", (0,), (), 3 * ALIGNMENT),), ())
    shards = shard_blocks(layout, [Stage(0, 1, (7,))], [Member(7, "node")])
    assert shards == (Shard(0, 0, 3 * ALIGNMENT, 7, None),)


LARGE = st.tuples(
    st.integers(65, 150), st.integers(1, 4), st.integers(1, 60_000), st.sampled_from([1, 2, 3, 40])
)


@given(LARGE, st.booleans())
@settings(max_examples=60)
def test_large_groups_have_shards_of_a_useful_size(case: tuple[int, int, int, int], tied: bool) -> None:
    workers, layers, units, domains = case
    blocks = [Block(i, f"layer{i}", (i,), (), (units + 100 * i) * ALIGNMENT) for i in range(layers)]
    if tied and layers > 1:
        blocks.append(Block(layers, "tied", (0, layers - 1), (), units * ALIGNMENT))
    layout = Layout(layers, tuple(blocks), ())
    stages = [Stage(0, layers, tuple(range(workers)))]
    members = [Member(worker, f"node{worker % domains}") for worker in range(workers)]
    shards = shard_blocks(layout, stages, members)
    assert [(s.block, s.start) for s in shards] == sorted((s.block, s.start) for s in shards)
    for block in blocks:
        own = [shard for shard in shards if shard.block == block.index]
        assert own[0].start == 0 and own[-1].stop == block.size
        assert all(left.stop == right.start for left, right in pairwise(own))
        assert all(shard.start % ALIGNMENT == 0 and shard.size > 0 for shard in own)
        assert max(s.size for s in own) - min(s.size for s in own) <= ALIGNMENT
        assert len({shard.owner for shard in own}) == len(own)
        if len(own) > 1:
            assert min(shard.size for shard in own) >= LEAST_UNITS * ALIGNMENT
    assert len(shards) <= max(workers, EVERYBODY * len(blocks)) + len(blocks)
    for shard in shards:
        assert shard.backup not in (None, shard.owner)
        if domains > 1:
            assert members[shard.backup or 0].domain != members[shard.owner].domain


@pytest.mark.parametrize(("workers", "each"), [(65, 6), (100, 4), (400, 1), (600, 1)])
def test_a_large_group_of_large_blocks_is_balanced(workers: int, each: int) -> None:
    layout = Layout(7, tuple(Block(i, f"layer{i}", (i,), (), 300_000 * ALIGNMENT) for i in range(7)), ())
    members = [Member(worker, f"node{worker // 8}") for worker in range(workers)]
    shards = shard_blocks(layout, [Stage(0, 7, tuple(range(workers)))], members)
    owned, backed_up = Counter(s.owner for s in shards), Counter(s.backup for s in shards)
    assert set(owned.values()) == set(backed_up.values()) == {each}
    assert len(owned) == len(backed_up) == workers
    assert max(s.size for s in shards) < 1.05 * min(s.size for s in shards)


@pytest.mark.parametrize("crowd", [51, 70])
def test_a_domain_with_more_than_half_of_a_large_group_is_backed_up_elsewhere(crowd: int) -> None:
    layout = Layout(2, tuple(Block(i, f"layer{i}", (i,), (), 900 * ALIGNMENT) for i in range(2)), ())
    members = [Member(worker, "crowd" if worker < crowd else "rest") for worker in range(100)]
    others = [Member(100 + worker, f"other{worker}") for worker in range(5)]
    stages = [Stage(0, 1, tuple(range(100))), Stage(1, 2, tuple(range(100, 105)))]
    domain = {member.worker: member.domain for member in [*members, *others]}
    for shard in shard_blocks(layout, stages, [*members, *others]):
        assert shard.backup is not None and domain[shard.backup] != domain[shard.owner]


def test_a_large_group_inside_one_domain_is_backed_up_outside_it() -> None:
    layout = Layout(2, tuple(Block(i, f"layer{i}", (i,), (), 900 * ALIGNMENT) for i in range(2)), ())
    members = [Member(worker, f"zone{worker // 100}") for worker in range(200)]
    stages = [Stage(0, 1, tuple(range(100))), Stage(1, 2, tuple(range(100, 200)))]
    for shard in shard_blocks(layout, stages, members):
        assert shard.backup is not None and shard.backup // 100 != shard.owner // 100
