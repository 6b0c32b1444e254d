"""Plans by search are whole and repeatable, keep to memory, and follow who is there."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.layout import ALIGNMENT, Block, Layout
from runtime.plan import Member, Plan, Strategy
from strategies.planning.costs import CostModel, levelled
from strategies.planning.folding import unfolded
from strategies.planning.planner import choose_plan
from strategies.search.planning import (
    KEPT,
    cut_for_schedule,
    fits,
    memory_bytes,
    plan_seconds,
    searched_plan,
)
from strategies.search.search import NothingFits
from strategies.search.space import Space

LAYERS = 6
LAYOUT = Layout(LAYERS, tuple(Block(i, f"layer{i}", (i,), (), ALIGNMENT) for i in range(LAYERS)), ())
COSTS = replace(
    CostModel.unmeasured(LAYOUT),
    boundary_bytes=(256,) * LAYERS,
    kept_bytes=(4096,) * LAYERS,
    entry_bytes=256,
)


def members_of(count: int, *slow: int) -> list[Member]:
    return [Member(w, f"node{w % 3}", 0.5 if w in slow else 1.0) for w in range(count)]


def check(plan: Plan, members: list[Member], micro_batches: int) -> None:
    assert plan.strategy is not None
    assert [layer for s in plan.stages for layer in range(s.first, s.stop)] == list(range(LAYERS))
    assert len(plan.stages) == len(plan.groups) * plan.strategy.chunks
    assert set(plan.workers) <= {member.worker for member in members}
    for stage, row in zip(plan.stages, plan.assignment, strict=True):
        assert len(row) == micro_batches and set(row) <= set(stage.workers)
    for block in LAYOUT.blocks:
        assert sum(shard.size for shard in plan.shards_of(block.index)) == block.size


@given(
    count=st.integers(1, 7),
    slow=st.lists(st.integers(0, 6), max_size=2),
    micro_batches=st.integers(1, 10),
    memory=st.sampled_from([None, 12_000, 40_000, 200_000]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_a_history_of_searched_plans(
    count: int, slow: list[int], micro_batches: int, memory: int | None, data: st.DataObject
) -> None:
    costs = replace(COSTS, worker_memory_bytes=memory)
    previous, present = None, members_of(count, *slow)
    for generation in range(3):
        try:
            plan = searched_plan(generation, present, LAYOUT, costs, micro_batches, Space(), previous)
        except NothingFits:
            assert previous is None, "training goes on whatever is left"
            return
        shuffled = data.draw(st.permutations(present))
        assert plan == searched_plan(generation, shuffled, LAYOUT, costs, micro_batches, Space(), previous)
        check(plan, present, micro_batches)
        gone = data.draw(st.integers(0, max(len(present) - 2, 0)))
        present = [*present[gone:], Member(10 + generation, "node9")]
        previous = plan


def test_scarce_memory_is_kept_to_by_recomputing() -> None:
    members, space = members_of(4), Space(stages=(2,), schedules=("1f1b",))
    free = searched_plan(0, members, LAYOUT, COSTS, 8, space)
    assert free.strategy is not None and free.strategy.recompute == ()
    limited = replace(COSTS, worker_memory_bytes=memory_bytes(free, COSTS) - 1)
    tight = searched_plan(0, members, LAYOUT, limited, 8, space)
    assert tight.strategy is not None and tight.strategy.recompute
    assert fits(tight, limited) and not fits(free, limited)
    assert plan_seconds(tight, members, COSTS) > plan_seconds(free, members, COSTS)


def test_what_fits_nowhere_is_refused_at_the_start_and_survived_later() -> None:
    costs = replace(COSTS, worker_memory_bytes=8_000)
    with pytest.raises(NothingFits, match=r"no plan for 4 workers fits 7\.812 KiB of memory each"):
        searched_plan(0, members_of(4), LAYOUT, costs, 8, Space())
    first = searched_plan(0, members_of(4), LAYOUT, COSTS, 8, Space())
    plan = searched_plan(1, members_of(3), LAYOUT, costs, 8, Space(), first)
    assert plan.strategy is not None and plan.strategy.recompute == tuple(range(LAYERS))


def test_where_nothing_fits_any_more_as_little_memory_as_can_be_is_taken() -> None:
    """However near the present strategy comes to it in time."""
    space = Space(shardings=("ddp", "zero1", "zero3"))
    members = members_of(4)
    first = searched_plan(0, members, LAYOUT, COSTS, 8, space)
    assert first.strategy is not None and first.strategy.sharding == "ddp"
    costs = replace(COSTS, worker_memory_bytes=1_000)
    plan = searched_plan(1, members[1:], LAYOUT, costs, 8, space, first)
    taken = memory_bytes(plan, costs)
    with pytest.raises(NothingFits, match="the leanest needs"):
        searched_plan(1, members[1:], LAYOUT, replace(costs, worker_memory_bytes=int(taken / 1.03)), 8, space)
    within = replace(costs, worker_memory_bytes=taken)
    assert fits(searched_plan(1, members[1:], LAYOUT, within, 8, space), within)


def test_a_strategy_that_is_hardly_better_does_not_replace_the_present_one() -> None:
    members = members_of(3)
    space = Space(stages=(3,), schedules=("1f1b", "gpipe"))
    gpipe = searched_plan(0, members, LAYOUT, COSTS, 8, replace(space, schedules=("gpipe",)))
    kept = searched_plan(1, members, LAYOUT, COSTS, 8, space, gpipe)
    anew = searched_plan(1, members, LAYOUT, COSTS, 8, space)
    assert kept.strategy == gpipe.strategy and kept.stages == gpipe.stages
    assert anew.strategy is not None and anew.strategy.schedule == "1f1b"
    both = [plan_seconds(plan, members, COSTS) for plan in (kept, anew)]
    assert both[0] <= both[1] * (1 + KEPT)


def test_with_nothing_changed_nothing_moves() -> None:
    """Which of two unequal groups is the larger is no matter to the closed form, but to the schedule."""
    layers = 16
    blocks = tuple(Block(i, f"layer{i}", (i,), (), ALIGNMENT * 100) for i in range(layers))
    layout = Layout(layers, blocks, ())
    costs = replace(
        CostModel.unmeasured(layout),
        forward_seconds=(1 / 64,) * layers,
        backward_seconds=(2 / 64,) * layers,
        link_bytes_per_second=1e6,
        boundary_bytes=(1_000,) * layers,
        kept_bytes=(4_000,) * layers,
    )
    for count, micro_batches in ((3, 9), (5, 7), (7, 6)):
        about = members_of(count), layout, costs, micro_batches, Space(stages=(2, 3))
        first = searched_plan(0, *about)
        again = searched_plan(1, *about, first)
        assert (again.stages, again.strategy) == (first.stages, first.strategy)


def test_a_slow_worker_has_less_to_do() -> None:
    plan = searched_plan(0, members_of(4, 3), LAYOUT, COSTS, 12, Space(stages=(1,)))
    assert len(plan.micro_batches_of(3)) < min(len(plan.micro_batches_of(w)) for w in range(3))


def test_every_schedule_is_ranked_by_its_own_time() -> None:
    members = members_of(4)
    found = {
        name: plan_seconds(
            searched_plan(0, members, LAYOUT, COSTS, 8, Space(stages=(3,), schedules=(name,))), members, COSTS
        )
        for name in ("1f1b", "zero-bubble")
    }
    assert found["zero-bubble"] < found["1f1b"]


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("zero-bubble", 1), ("interleaved", 2)])
def test_layers_are_cut_for_the_schedule_that_is_named(schedule: str, chunks: int) -> None:
    rng, strategy, gains = random.Random(7), Strategy(schedule, chunks), []
    for _ in range(25):
        seconds = levelled([0.01 * rng.choice([1.0, 1.0, 1.0, 0.3, 2.5]) for _ in range(12)])
        layout = Layout(12, tuple(Block(i, f"layer{i}", (i,), (), ALIGNMENT) for i in range(12)), ())
        costs = replace(
            CostModel.unmeasured(layout),
            forward_seconds=seconds,
            backward_seconds=tuple(2 * each for each in seconds),
        )
        members = members_of(rng.choice([4, 6, 7]), *rng.choice([(), (1,)]))
        plan, _ = choose_plan(3, members, layout, costs, 12, rng.choice([2, 3]))
        plan = unfolded(plan, chunks, layout, members, [3 * each for each in seconds])
        found = cut_for_schedule(plan, strategy, layout, members, costs, None)
        assert found.generation == 3 and len(found.groups) == len(plan.groups) and found.strategy is None
        before, after = (plan_seconds(replace(p, strategy=strategy), members, costs) for p in (plan, found))
        assert found == plan or before > after * (1 + KEPT)
        gains.append(before / after)
    assert max(gains) > 1.05
    large = replace(plan, assignment=tuple(row * 60 for row in plan.assignment))
    assert cut_for_schedule(large, strategy, layout, members, costs, None) is large


def test_with_few_layers_for_many_chunks_fewer_are_cut() -> None:
    members = members_of(3)
    for workers in (2, 3):
        layout = Layout(5, LAYOUT.blocks[:5], ())
        costs = CostModel.unmeasured(layout)
        plan, _ = choose_plan(0, members[:workers], layout, costs, 8, workers)
        plan = unfolded(plan, 5 // workers, layout, members, [1.0] * 5)
        found = cut_for_schedule(plan, Strategy("interleaved", 4), layout, members[:workers], costs, None)
        assert len(found.stages) == len(plan.stages) == workers * (5 // workers)
