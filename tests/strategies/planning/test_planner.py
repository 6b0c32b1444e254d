"""Every plan is whole and repeatable, whoever is there; the choice follows the predicted time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.layout import ALIGNMENT, Block, Layout
from runtime.plan import Member, Plan
from strategies.planning.costs import STATE, Division, Predictor
from strategies.planning.planner import ROOM, CostModel, choose_plan, predicted_gain
from strategies.planning.ranking import DRAWS, UNSTEADINESS, assign, stages_of, step_seconds
from strategies.planning.step_time import simulate_step


def layout_of(layers: int, units: int = 8, tied: bool = False) -> Layout:
    blocks = [Block(i, f"layer{i}", (i,), (), units * ALIGNMENT) for i in range(layers)]
    if tied:
        blocks.append(Block(layers, "tied", (0, layers - 1), (), units * ALIGNMENT))
    return Layout(layers, tuple(blocks), ())


def costs_of(layout: Layout, seconds: Sequence[float], **settings: Any) -> CostModel:
    sizes = CostModel.unmeasured(layout).parameter_bytes
    return CostModel(tuple(seconds), tuple(2 * s for s in seconds), sizes, **settings)


def check_whole(
    plan: Plan,
    members: Sequence[Member],
    layout: Layout,
    micro_batches: int,
    left_out: Collection[int] = (),
) -> None:
    assert [layer for s in plan.stages for layer in range(s.first, s.stop)] == list(range(layout.layers))
    assert plan.workers == tuple(sorted(set(plan.workers)))
    assert sorted([*plan.workers, *left_out]) == sorted(m.worker for m in members)
    assert all(stage.workers and stage.workers == tuple(sorted(stage.workers)) for stage in plan.stages)
    assert len(plan.assignment) == len(plan.stages)
    for stage, row in zip(plan.stages, plan.assignment, strict=True):
        assert len(row) == micro_batches and set(row) <= set(stage.workers)
    for block in layout.blocks:
        covered = [(s.start, s.stop) for s in plan.shards_of(block.index)]
        assert covered[0][0] == 0 and covered[-1][1] == block.size
        assert all(a[1] == b[0] for a, b in pairwise(covered))
    domain = {m.worker: m.domain for m in members}
    several = len(set(domain.values())) > 1
    for shard in plan.shards:
        assert shard.owner in plan.holders(layout.blocks[shard.block].layers)
        assert (shard.backup is None) == (len(members) == 1)
        assert shard.backup != shard.owner
        if several:
            assert shard.backup is not None and domain[shard.backup] != domain[shard.owner]


MEMBERS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from([0.5, 1.0, 1.0, 1.3])), min_size=1, max_size=9
).map(lambda rows: [Member(i, domain, speed) for i, (domain, speed) in enumerate(rows)])


@given(
    members=MEMBERS,
    layers=st.integers(1, 7),
    micro_batches=st.integers(1, 12),
    stages=st.one_of(st.just("auto"), st.integers(1, 5)),
    tied=st.booleans(),
    memory=st.sampled_from([None, 1_000, 20_000, 1_000_000]),
    data=st.data(),
)
@settings(max_examples=100)
def test_a_history_of_plans(
    members: list[Member],
    layers: int,
    micro_batches: int,
    stages: Any,
    tied: bool,
    memory: int | None,
    data: st.DataObject,
) -> None:
    layout = layout_of(layers, tied=tied and layers > 1)
    seconds = data.draw(st.lists(st.sampled_from([0.01, 0.02, 0.05]), min_size=layers, max_size=layers))
    costs = costs_of(layout, seconds, worker_memory_bytes=memory)
    previous, present = None, list(members)
    for generation in range(3):
        shuffled = data.draw(st.permutations(present))
        plan, prediction = choose_plan(generation, present, layout, costs, micro_batches, stages, previous)
        again = choose_plan(generation, shuffled, layout, costs, micro_batches, stages, previous)
        assert again == (plan, prediction)
        left_out = set(prediction.left_out)
        assert not left_out & set(plan.workers)
        assert all(m.speed < max(each.speed for each in present) for m in present if m.worker in left_out)
        check_whole(plan, present, layout, micro_batches, left_out)
        assert plan.generation == generation
        assert prediction.step_seconds > 0 and prediction.move_bytes >= 0
        if stages != "auto":
            asked = min(stages, len(plan.workers), layers)
            assert len(plan.stages) in ((asked - 1, asked) if previous and asked > 2 else (asked,))
        kept = data.draw(st.lists(st.sampled_from(present), min_size=1, unique=True))
        joined = data.draw(st.integers(0, 2))
        present = kept + [Member(100 * generation + 50 + i, "d") for i in range(joined)]
        previous = plan


def members_of(count: int, domains: int = 1) -> list[Member]:
    return [Member(worker, f"node{worker % domains}") for worker in range(count)]


def test_an_undisturbed_plan_moves_nothing() -> None:
    layout, members = layout_of(8), members_of(4)
    costs = costs_of(layout, [0.01] * 8)
    first, _ = choose_plan(0, members, layout, costs, 16, 2)
    second, prediction = choose_plan(1, members, layout, costs, 16, 2, first)
    assert (second.stages, second.shards) == (first.stages, first.shards)
    assert prediction.move_bytes == 0


def test_a_loss_in_a_stage_of_three_redeals_when_moving_is_dear() -> None:
    layout = layout_of(4, units=1000)
    slow_link = costs_of(layout, [0.01] * 4, link_bytes_per_second=1e3)
    first, _ = choose_plan(0, members_of(6), layout, slow_link, 8, 2)
    survivors = [m for m in members_of(6) if m.worker != first.stages[0].workers[0]]
    plan, prediction = choose_plan(1, survivors, layout, slow_link, 8, 2, first)
    assert [(s.first, s.stop) for s in plan.stages] == [(s.first, s.stop) for s in first.stages]
    assert prediction.reason.startswith("kept the cut and re-dealt")
    assert len(set(plan.assignment[0])) == 2 and len(set(plan.assignment[1])) == 3


def test_a_loss_moves_layers_when_that_is_faster() -> None:
    layout = layout_of(12)
    costs = costs_of(layout, [0.01] * 12, link_bytes_per_second=1e12)
    first, _ = choose_plan(0, members_of(6), layout, costs, 24, 2)
    assert [(s.stop - s.first, len(s.workers)) for s in first.stages] == [(6, 3), (6, 3)]
    survivors = [m for m in members_of(6) if m.worker != first.stages[1].workers[0]]
    plan, prediction = choose_plan(1, survivors, layout, costs, 24, 2, first)
    layers = [stage.stop - stage.first for stage in plan.stages]
    sizes = [len(stage.workers) for stage in plan.stages]
    assert (layers[0] > layers[1]) == (sizes[0] > sizes[1])
    kept = next(c for c in prediction.candidates if c.name.startswith("kept the cut and re-dealt"))
    assert prediction.step_seconds < kept.step_seconds


def test_a_stage_that_lost_everybody_is_rebuilt() -> None:
    layout = layout_of(4)
    costs = costs_of(layout, [0.01] * 4)
    first, _ = choose_plan(0, members_of(4), layout, costs, 8, 2)
    survivors = [m for m in members_of(4) if m.worker in first.stages[0].workers]
    plan, _ = choose_plan(1, survivors, layout, costs, 8, 2, first)
    check_whole(plan, survivors, layout, 8)
    assert len(plan.stages) == 2


def test_a_newcomer_joins_the_stage_that_needs_it() -> None:
    layout = layout_of(4, units=1000)
    costs = costs_of(layout, [0.01] * 4, link_bytes_per_second=1e5)
    first, _ = choose_plan(0, members_of(4), layout, costs, 8, 2)
    lost = first.stages[1].workers[1]
    survivors = [m for m in members_of(4) if m.worker != lost]
    second, _ = choose_plan(1, survivors, layout, costs, 8, 2, first)
    short = next(k for k, stage in enumerate(second.stages) if len(stage.workers) == 1)
    third, _ = choose_plan(2, [*survivors, Member(9, "node0")], layout, costs, 8, 2, second)
    assert third.stage_of(9) == short
    assert [third.stage_of(m.worker) for m in survivors] == [second.stage_of(m.worker) for m in survivors]


def test_a_slow_worker_gets_fewer_micro_batches() -> None:
    layout = layout_of(1)
    members = [Member(0, "n"), Member(1, "n", speed=0.5)]
    plan, _ = choose_plan(0, members, layout, costs_of(layout, [0.01]), 9, 1)
    assert (len(plan.micro_batches_of(0)), len(plan.micro_batches_of(1))) == (6, 3)


def test_surplus_workers_own_shards_without_micro_batches() -> None:
    layout = layout_of(1)
    plan, _ = choose_plan(0, members_of(5), layout, costs_of(layout, [0.01]), 2, 1)
    idle = [worker for worker in plan.workers if not plan.micro_batches_of(worker)]
    assert len(idle) == 3
    assert all(any(plan.owned_by(worker)) for worker in idle)


def test_a_first_plan_spreads_stage_groups_over_domains() -> None:
    layout = layout_of(4)
    members = [Member(worker, f"node{worker // 2}") for worker in range(4)]
    plan, _ = choose_plan(0, members, layout, costs_of(layout, [0.01] * 4), 8, 2)
    assert [stage.workers for stage in plan.stages] == [(0, 2), (1, 3)]


def test_auto_cuts_only_where_memory_or_links_ask_for_it() -> None:
    layout = layout_of(4, units=1000)
    roomy = costs_of(layout, [0.01] * 4)
    assert len(choose_plan(0, members_of(4), layout, roomy, 8)[0].stages) == 1
    total = sum(roomy.parameter_bytes)
    tight = costs_of(layout, [0.01] * 4, worker_memory_bytes=5 * total)
    plan, prediction = choose_plan(0, members_of(4), layout, tight, 8)
    assert len(plan.stages) > 1 and "memory" not in prediction.reason
    slow_link = costs_of(layout, [0.01] * 4, link_bytes_per_second=1e6)
    assert len(choose_plan(0, members_of(4), layout, slow_link, 8)[0].stages) > 1


def test_too_little_memory_is_said_and_the_leanest_plan_is_taken() -> None:
    layout = layout_of(4, units=1000)
    costs = costs_of(layout, [0.01] * 4, worker_memory_bytes=1000)
    plan, prediction = choose_plan(0, members_of(4), layout, costs, 8)
    assert len(plan.stages) == 4
    assert "no division fits 1000 bytes" in prediction.reason


def test_the_prediction_is_the_simulated_step_plus_communication() -> None:
    layout, members = layout_of(6), members_of(5)
    costs = costs_of(layout, [0.01, 0.02, 0.01, 0.03, 0.01, 0.01], boundary_bytes=(1000,) * 6)
    plan, prediction = choose_plan(0, members, layout, costs, 8, 3)
    speeds = {m.worker: m.speed for m in members}
    simulated = fmean(
        simulate_step(plan, costs.forward_seconds, costs.backward_seconds, speeds, UNSTEADINESS, draw)
        for draw in range(DRAWS)
    )
    division = Division((0, *(s.stop for s in plan.stages)), tuple(s.workers for s in plan.stages))
    extra = Predictor(costs, members, 8, None).communication_seconds(division)
    assert extra > 0
    assert prediction.step_seconds == pytest.approx(simulated + extra)
    assert min(c.step_seconds for c in prediction.candidates) <= prediction.step_seconds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": []}, "at least one worker"),
        ({"members": [Member(0, "n"), Member(0, "n")]}, "listed twice"),
        ({"members": [Member(0, "n", speed=0.0)]}, "not positive"),
        ({"micro_batches": 0}, "at least 1"),
        ({"stages": 0}, "at least 1"),
        ({"costs": CostModel((1.0,), (1.0,), (4,))}, "one per layer: 2"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    layout = layout_of(2)
    arguments: dict[str, Any] = {
        "generation": 0,
        "members": members_of(2),
        "layout": layout,
        "costs": CostModel.unmeasured(layout),
        "micro_batches": 4,
    }
    with pytest.raises(ValueError, match=message):
        choose_plan(**{**arguments, **change})


def test_half_speed_costs_hardly_more_than_the_speed_that_is_gone() -> None:
    layout, members = layout_of(32), members_of(8)
    costs = costs_of(layout, [0.01] * 32, link_bytes_per_second=1e12)
    even, _ = choose_plan(0, members, layout, costs, 64, 4)
    slowed = [replace(m, speed=0.5) if m.worker == 7 else m for m in members]
    plan, prediction = choose_plan(1, slowed, layout, costs, 64, 4, even)
    undisturbed = step_seconds(even, members, costs)
    ideal = undisturbed / (7.5 / 8)
    assert ideal / step_seconds(plan, slowed, costs) > 0.95
    assert ideal / step_seconds(even, slowed, costs) < 0.6
    assert prediction.left_out == () and len(plan.micro_batches_of(7)) > 0
    assert predicted_gain(even, plan, slowed, costs) > 0.6
    assert predicted_gain(plan, plan, slowed, costs) == 0.0


def test_a_worker_that_everybody_waits_for_is_left_out() -> None:
    layout, members = layout_of(32), members_of(8, domains=4)
    costs = costs_of(layout, [0.01] * 32, link_bytes_per_second=1e12)
    slowed = [replace(m, speed=0.05) if m.worker == 3 else m for m in members]
    plan, prediction = choose_plan(0, slowed, layout, costs, 64, 4)
    assert prediction.left_out == (3,) and 3 not in plan.workers
    assert "faster without worker 3" in prediction.reason
    check_whole(plan, slowed, layout, 64, {3})
    without, _ = choose_plan(0, [m for m in members if m.worker != 3], layout, costs, 64, 4)
    assert step_seconds(plan, slowed, costs) <= step_seconds(without, members, costs) * 1.01


@pytest.mark.parametrize("speeds", [(1.0, 0.01), (1.0, 1.0, 0.01)])
def test_nobody_is_left_out_whom_the_backups_need(speeds: tuple[float, ...]) -> None:
    layout = layout_of(4)
    members = [Member(i, "near" if speed == 1.0 else "far", speed) for i, speed in enumerate(speeds)]
    plan, prediction = choose_plan(0, members, layout, costs_of(layout, [0.01] * 4), 8, 1)
    assert prediction.left_out == ()
    check_whole(plan, members, layout, 8)


def test_long_plans_are_predicted_by_the_closed_formula() -> None:
    layout, members = layout_of(4), members_of(4)
    costs = costs_of(layout, [0.01] * 4)
    short, _ = choose_plan(0, members, layout, costs, 64, 2)
    long, _ = choose_plan(0, members, layout, costs, 6400, 2)
    ratio = step_seconds(long, members, costs) / step_seconds(short, members, costs)
    assert ratio == pytest.approx((3200 + 1) / (32 + 1), rel=0.02)


def test_one_stage_fewer_only_after_a_change_and_with_room() -> None:
    layout, members = layout_of(32), members_of(16)
    costs = costs_of(layout, [0.01] * 32, link_bytes_per_second=1e12)
    first, _ = choose_plan(0, members, layout, costs, 64, 4)
    assert [(s.stop - s.first, len(s.workers)) for s in first.stages] == [(8, 4)] * 4
    fresh, _ = choose_plan(0, members[:15], layout, costs, 64, 4)
    assert len(fresh.stages) == 4
    after, prediction = choose_plan(1, members[:15], layout, costs, 64, 4, first)
    assert len(after.stages) == 3 and after.stages[-1].stop == 32
    assert prediction.step_seconds < step_seconds(fresh, members, costs)
    predictor = Predictor(costs, members[:15], 64, None)
    division = Division((0, *(s.stop for s in after.stages)), tuple(s.workers for s in after.stages))
    assert predictor.memory_bytes(division) <= ROOM * predictor.even_memory_bytes(4, 15)


@pytest.mark.parametrize("workers", [8, 16])
def test_losses_cost_hardly_more_than_the_workers_that_are_gone(workers: int) -> None:
    layout = layout_of(32)
    costs = costs_of(layout, [0.01] * 32, link_bytes_per_second=1e12)
    members = members_of(workers)
    plan, _ = choose_plan(0, members, layout, costs, 64, 4)
    undisturbed = step_seconds(plan, members, costs)
    for lost in range(1, 4):
        victim = max(max(plan.stages, key=lambda stage: len(stage.workers)).workers)
        members = [m for m in members if m.worker != victim]
        plan, _ = choose_plan(lost, members, layout, costs, 64, 4, plan)
        ideal = undisturbed * workers / (workers - lost)
        assert ideal / step_seconds(plan, members, costs) > 0.96


@pytest.mark.parametrize("stages", [4, "auto"])
def test_thousands_of_workers_are_planned_whole(stages: Any) -> None:
    layout = layout_of(12, units=40_000)
    members = members_of(2_000, domains=250)
    costs = costs_of(layout, [0.01] * 12, link_bytes_per_second=1e12)
    first, _ = choose_plan(0, members, layout, costs, 2_000, stages)
    check_whole(first, members, layout, 2_000)
    assert len({len(stage.workers) for stage in first.stages}) == 1
    again, prediction = choose_plan(1, members, layout, costs, 2_000, stages, first)
    assert (again.stages, again.shards, prediction.move_bytes) == (first.stages, first.shards, 0)
    lost = [replace(m, speed=0.5) if m.worker % 100 == 50 else m for m in members if m.domain != "node7"]
    plan, prediction = choose_plan(2, lost, layout, costs, 2_000, stages, first)
    check_whole(plan, lost, layout, 2_000)
    assert prediction.left_out == ()


def test_moves_count_every_new_byte_once() -> None:
    layout, members = layout_of(6), members_of(6)
    costs = costs_of(layout, [0.01] * 6)
    each = costs.parameter_bytes[0]
    before = Division((0, 3, 6), ((0, 1, 2), (3, 4, 5)))
    previous = Plan(0, stages_of(before), assign(before, Predictor(costs, members, 6, None)), ())
    predictor = Predictor(costs, members, 6, previous)
    assert predictor.moves(before) == (0, 0.0)
    # layer 3 comes to the first group: parameters to three workers; state and backups of the changed
    # layer; nothing of what the second group keeps
    total, _ = predictor.moves(Division((0, 4, 6), before.groups))
    assert total == 3 * each + 2 * STATE * each
    # worker 5 changes sides: three layers' parameters to it, and all state is divided anew
    total, _ = predictor.moves(Division((0, 3, 6), ((0, 1, 2, 5), (3, 4))))
    assert total == 3 * each + 2 * STATE * 6 * each
