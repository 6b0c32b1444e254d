"""Stage groups that hold several stages: whole plans, from the planner's and back."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from runtime.layout import ALIGNMENT, Block, Layout
from runtime.plan import Member
from strategies.planning.costs import CostModel
from strategies.planning.folding import folded, unfolded
from strategies.planning.planner import choose_plan

MICRO_BATCHES = 6


def layout_of(layers: int, *, tied: bool) -> Layout:
    blocks = [Block(i, f"l{i}", (i,), (), 4 * ALIGNMENT) for i in range(layers)]
    if tied and layers > 1:
        blocks.append(Block(layers, "tied", (0, layers - 1), (), 3 * ALIGNMENT))
    return Layout(layers, tuple(blocks), ())


@given(
    workers=st.integers(1, 8),
    layers=st.integers(1, 12),
    stages=st.integers(1, 4),
    chunks=st.integers(1, 4),
    tied=st.booleans(),
    seconds=st.lists(st.integers(1, 4), min_size=12, max_size=12),
)
def test_unfolded_plans_are_whole(
    workers: int, layers: int, stages: int, chunks: int, tied: bool, seconds: list[int]
) -> None:
    layout = layout_of(layers, tied=tied)
    members = [Member(worker, f"n{worker % 3}") for worker in range(workers)]
    plan, _ = choose_plan(1, members, layout, CostModel.unmeasured(layout), MICRO_BATCHES, stages)
    made = unfolded(plan, chunks, layout, members, [float(s) for s in seconds[:layers]])
    groups = [stage.workers for stage in plan.stages]
    assert [stage.workers for stage in made.stages] == groups * (len(made.stages) // len(groups))
    assert len(made.stages) == len(groups) * max(min(chunks, layers // len(groups)), 1)
    bounds = [0, *(stage.stop for stage in made.stages)]
    assert bounds[-1] == layers and all(first < stop for first, stop in pairwise(bounds))
    assert [stage.first for stage in made.stages] == bounds[:-1]
    assert made.workers == plan.workers
    for block in layout.blocks:
        holders = made.holders(block.layers)
        assert len(set(holders)) == len(holders)
        assert sum(shard.size for shard in made.shards_of(block.index)) == block.size
        assert all(shard.owner in holders for shard in made.shards_of(block.index))
    for worker in made.workers:
        for k in made.stages_of(worker):
            mine = made.micro_batches_of(worker, k)
            assert [m for m in range(MICRO_BATCHES) if made.assignment[k][m] == worker] == list(mine)
    back = folded(made)
    assert [stage.workers for stage in back.stages] == groups
    assert back.stages[-1].stop == layers and back.assignment == plan.assignment


def test_the_same_groups_get_the_same_layers_again() -> None:
    layout = layout_of(8, tied=False)
    members = [Member(worker, f"n{worker}") for worker in range(4)]
    costs = CostModel.unmeasured(layout)
    seconds = [1.0] * 8
    plan, _ = choose_plan(1, members, layout, costs, MICRO_BATCHES, 2)
    made = unfolded(plan, 2, layout, members, seconds)
    assert [(s.first, s.stop) for s in made.stages] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    again, _ = choose_plan(2, members, layout, costs, MICRO_BATCHES, 2, folded(made))
    assert unfolded(again, 2, layout, members, seconds).stages == made.stages
