"""The plan that finishes an interrupted step."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from runtime.layout import ALIGNMENT, Block, Layout
from runtime.plan import Member
from runtime.salvage import Status, WorkerProgress, kept, layers_of, remaining, salvage
from strategies.planning.costs import CostModel
from strategies.planning.mending import mended, pays
from strategies.planning.planner import choose_plan

LAYERS, MICRO_BATCHES = 6, 8
LAYOUT = Layout(LAYERS, tuple(Block(i, f"l{i}", (i,), (), 8 * ALIGNMENT) for i in range(LAYERS)), ())
STEP = 7


def members(*workers: int) -> list[Member]:
    return [Member(worker, f"n{worker}") for worker in workers]


def plan_of(workers: int, stages: int):  # type: ignore[no-untyped-def]
    plan, _ = choose_plan(
        1, members(*range(workers)), LAYOUT, CostModel.unmeasured(LAYOUT), MICRO_BATCHES, stages
    )
    return plan


def progress_of(plan, worker: int, done: int, step: int = STEP) -> WorkerProgress:  # type: ignore[no-untyped-def]
    mine = [(plan.stage_of(worker), micro_batch) for micro_batch in plan.micro_batches_of(worker)]
    return WorkerProgress(step, layers_of(plan, worker), dict.fromkeys(mine[:done], Status.DONE))


@given(st.data())
def test_a_mended_plan_is_whole_and_keeps_what_it_says(data: st.DataObject) -> None:
    workers, stages = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 3))
    old = plan_of(workers, stages)
    lost = data.draw(st.sets(st.sampled_from(old.workers), min_size=1, max_size=workers - 1))
    reserve = data.draw(st.integers(0, 2))
    alive = [w for w in old.workers if w not in lost] + list(range(50, 50 + reserve))
    progress = {w: progress_of(old, w, data.draw(st.integers(0, 8))) for w in alive if w < 50}
    result = mended(2, members(*alive), LAYOUT, old, STEP, progress, [1.0] * LAYERS)
    if result is None:
        assert any(set(stage.workers) <= lost for stage in old.stages)
        assert len(alive) < len(old.stages), "else one of a larger group can be spared"
        return
    plan, found = result
    lent = {w for w in plan.workers if w in old.workers and plan.stage_of(w) != old.stage_of(w)}
    assert not lent or (any(set(stage.workers) <= lost for stage in old.stages) and reserve < len(lost))
    lost |= lent
    progress = {w: p for w, p in progress.items() if w not in lent}
    assert [(s.first, s.stop) for s in plan.stages] == [(s.first, s.stop) for s in old.stages]
    assert set(plan.workers) <= set(alive)
    for k, (before, after) in enumerate(zip(old.assignment, plan.assignment, strict=True)):
        assert len(after) == MICRO_BATCHES and set(after) <= set(plan.stages[k].workers)
        assert all(new == old_one for old_one, new in zip(before, after, strict=True) if old_one not in lost)
    assert found.contributors == set(progress)
    done = {(k, m) for k, statuses in enumerate(found.statuses) for m in statuses}
    assert done == {task for p in progress.values() for task in p.statuses}
    left = remaining(plan, found)
    assert sum(sum(stages.values()) for stages in left.values()) == MICRO_BATCHES * len(plan.stages) - len(
        done
    )
    assert 0.0 <= kept(plan, found) <= 1.0
    for block in LAYOUT.blocks:
        assert sum(shard.size for shard in plan.shards_of(block.index)) == block.size


def test_a_worker_in_reserve_takes_the_place_of_a_stage_with_nobody_left() -> None:
    old = plan_of(3, 3)
    assert mended(2, members(0, 2), LAYOUT, old, STEP, {}, [1.0] * LAYERS) is None
    result = mended(2, members(0, 2, 9), LAYOUT, old, STEP, {}, [1.0] * LAYERS)
    assert result is not None
    assert [stage.workers for stage in result[0].stages] == [(0,), (9,), (2,)]


def test_what_teams_have_computed_is_not_gone_on_with() -> None:
    alone = plan_of(4, 1)
    paired = replace(alone, teams=((0, 1),))
    results = [mended(2, members(0, 2, 3), LAYOUT, old, STEP, {}, [1.0] * LAYERS) for old in (alone, paired)]
    assert [result is None for result in results] == [False, True]


def test_a_stage_with_nobody_left_gets_as_many_of_others_as_finish_soonest() -> None:
    old = plan_of(12, 3)
    assert [len(stage.workers) for stage in old.stages] == [4, 4, 4]
    lost = set(old.stages[1].workers)
    alive = [worker for worker in old.workers if worker not in lost]
    progress = {worker: progress_of(old, worker, 8) for worker in alive}
    progress[0] = progress_of(old, 0, 1)  # of two
    result = mended(2, members(*alive), LAYOUT, old, STEP, progress, [1.0] * LAYERS)
    assert result is not None
    plan, found = result
    assert [len(stage.workers) for stage in plan.stages] == [2, 4, 2], "fewer would take longer"
    assert 0 in plan.stages[1].workers, "it has the least to lose"
    assert found.contributors == set(alive) - set(plan.stages[1].workers)
    assert kept(plan, found) > 0.3 and pays(plan, found, members(*alive), [1.0] * LAYERS)


def test_progress_of_another_step_or_other_layers_is_not_used() -> None:
    old = plan_of(4, 2)
    wrong = progress_of(old, 0, 2)
    others = {
        0: WorkerProgress(STEP, {0: (0, old.stages[0].stop - 1)}, wrong.statuses),
        1: progress_of(old, 1, 2, step=STEP + 1),
        2: progress_of(old, 2, 2),
    }
    assert salvage(old, STEP, others).contributors == {2}


def test_it_pays_late_in_a_step_and_not_at_its_beginning() -> None:
    old = plan_of(6, 3)
    alive = members(0, 1, 2, 3, 4)
    for done, worth in ((0, False), (8, True)):
        progress = {member.worker: progress_of(old, member.worker, done) for member in alive}
        result = mended(2, alive, LAYOUT, old, STEP, progress, [1.0] * LAYERS)
        assert result is not None
        assert pays(*result, alive, [1.0] * LAYERS) is worth
