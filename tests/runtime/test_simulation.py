"""Random schedules of faults against the real controller and planner: nothing that must hold is violated."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest

from jobs.schedules import eager_planner
from runtime.events import StepRecord
from runtime.plan import Plan, Stage
from runtime.simulation.checks import Violation, check_plan
from runtime.simulation.cluster import SimCluster
from runtime.simulation.journal import Journal
from runtime.simulation.schedule import POINTS, Fault, Kind, Schedule, draw, run
from runtime.simulation.toy import reference

SEEDS, A_TEST = 200, 50


@pytest.mark.parametrize("first", range(0, SEEDS, A_TEST))
def test_schedules(first: int) -> None:
    failures, seen = [], Counter[str]()
    for seed in range(first, first + A_TEST):
        try:
            cluster = run(draw(seed), eager_planner)
        except Violation as violation:
            failures.append(f"{violation}\nreplay it: reknit simulate --replay {seed}")
            continue
        seen["recoveries"] += cluster.interrupts
        seen["changes"] += cluster.checks.changes
        seen["steps"] += cluster.record.recorded
        seen["salvaged"] += cluster.salvaged_micro_batches
    assert not failures, "\n".join(failures)
    # the faults did strike
    assert min(seen["recoveries"], seen["changes"], seen["salvaged"], seen["steps"] // 10) > 10


def test_seeds_cover_every_kind_and_place() -> None:
    faults = [fault for seed in range(SEEDS) for fault in draw(seed).faults]
    assert {fault.kind for fault in faults} == set(get_args(Kind))
    assert {fault.point for fault in faults} - {""} == set(POINTS)


def undisturbed(seed: int = 0) -> Schedule:
    return replace(draw(seed), faults=())


def fault(kind: Kind, moment: float | None, point: str = "", **more: float) -> Fault:
    amount, seconds = more.get("amount", 0.0), more.get("seconds", 1.0)
    return Fault(kind, moment, point, int(more.get("count", 1)), True, more.get("pick", 0.0), seconds, amount)


def kinds_of_notes(cluster: SimCluster) -> Counter[str]:
    return Counter(type(event).__name__ for _, event in cluster.record.events)


def test_nothing_happens_to_an_undisturbed_run() -> None:
    cluster = run(undisturbed(), eager_planner)
    steps = cluster.settings.steps
    assert [record.step for record in cluster.record.steps] == list(range(1, steps + 1))
    assert (cluster.interrupts, cluster.checks.resumes, cluster.checks.gaps) == (0, 1, 0)
    model = cluster.settings.model
    assert [record.loss for record in cluster.record.steps] == [
        reference(model).loss(step) for step in range(1, steps + 1)
    ]
    assert cluster.host.end is not None and cluster.host.end.outcome == "completed"


def test_equal_seeds_give_equal_runs() -> None:
    first, second = Journal(), Journal()
    seed = next(seed for seed in range(SEEDS) if len(draw(seed).faults) > 2)
    run(draw(seed), eager_planner, first)
    run(draw(seed), eager_planner, second)
    assert first.lines == second.lines and len(first.lines) > 20
    assert any("****" in line for line in first.lines)


@pytest.mark.parametrize("point", ["forward", "exchange", "optimizer", "gather", "backup", "entry"])
def test_a_kill_in_the_middle_of_a_step(point: str) -> None:
    schedule = draw(3)  # elastic: newcomers come, so there are entries as well
    assert schedule.settings.max_workers is not None and len(schedule.settings.domains) > 2
    first = fault("kill", None, "forward", count=10)
    second = fault("kill", None, point, count=1 if point == "entry" else 2)
    faults = (first,) if point == "forward" else (first, second)
    cluster = run(replace(schedule, faults=faults), eager_planner)
    assert kinds_of_notes(cluster)["WorkerLost"] >= len(faults)
    assert cluster.checks.resumes > 1 and cluster.record.recorded == schedule.settings.steps


def test_a_stopped_worker_is_given_up_and_leaves_when_it_wakes_up() -> None:
    schedule = replace(undisturbed(3), faults=(fault("stop", 0.6, seconds=8.0),))
    journal = Journal()
    cluster = run(schedule, eager_planner, journal)
    assert any("no sign of life" in line for line in journal.lines)
    assert cluster.record.recorded == schedule.settings.steps


def test_a_dead_controller_is_replaced_and_learns() -> None:
    schedule = replace(undisturbed(3), faults=(fault("kill controller", 0.6, seconds=0.3),))
    cluster = run(schedule, eager_planner)
    assert kinds_of_notes(cluster)["ControllerRestarted"] == 1
    assert cluster.interrupts == 0 and cluster.record.recorded == schedule.settings.steps


def test_a_violation_names_its_seed_and_schedule() -> None:
    schedule = replace(draw(11), settings=replace(draw(11).settings, min_workers=99), faults=())
    with pytest.raises(Violation, match=r"seed 11: .* steps on"):
        run(schedule, eager_planner)


# --- the checks themselves ------------------------------------------------------------------


def started(seed: int = 3) -> SimCluster:
    """A cluster in the middle of its run."""
    cluster = SimCluster(draw(seed).settings, eager_planner, seed)
    while cluster.checks.exchanges < 3:
        cluster.clock.step()
    return cluster


def plan_of(cluster: SimCluster) -> Plan:
    plan = cluster.host.controller.plan
    assert plan is not None
    return plan


def check_of(cluster: SimCluster, plan: Plan) -> None:
    model = cluster.settings.model
    check_plan(model.layout, plan, model.micro_batches, cluster.domains)


def test_a_plan_with_two_owners_of_a_shard_is_caught() -> None:
    cluster = started()
    plan = plan_of(cluster)
    check_of(cluster, plan)
    first, second, *others = plan.shards
    twice = replace(plan, shards=(first, replace(second, start=first.start), *others))
    with pytest.raises(Violation, match="not one owner"):
        check_of(cluster, twice)
    with pytest.raises(Violation, match=r"not owned to its end|not one owner"):
        check_of(cluster, replace(plan, shards=plan.shards[:-1]))


def test_a_plan_with_another_batch_is_caught() -> None:
    cluster = started()
    plan = plan_of(cluster)
    with pytest.raises(Violation, match="micro-batches"):
        check_of(cluster, replace(plan, assignment=tuple(row[:-1] for row in plan.assignment)))


def test_a_plan_without_a_layer_is_caught() -> None:
    cluster = started()
    plan = plan_of(cluster)
    last = plan.stages[-1]
    shorter = (*plan.stages[:-1], Stage(last.first, last.stop - 1, last.workers))
    with pytest.raises(Violation, match="layers are missing"):
        check_of(cluster, replace(plan, stages=shorter))


def test_a_backup_in_its_owners_domain_is_caught() -> None:
    cluster = started()
    plan = plan_of(cluster)
    shard = plan.shards[0]
    domains = dict.fromkeys((shard.owner, shard.backup), "node-a")
    apart = {worker: domains.get(worker, "node-b") for worker in plan.workers}
    assert set(apart.values()) == {"node-a", "node-b"}
    model = cluster.settings.model
    with pytest.raises(Violation, match="kept in one failure domain"):
        check_plan(model.layout, plan, model.micro_batches, apart)


def test_a_second_commit_of_a_step_is_caught() -> None:
    cluster = started()
    plan = plan_of(cluster)
    step = cluster.checks.newest
    worker = plan.workers[0]
    with pytest.raises(Violation, match=r"twice|by itself"):
        cluster.checks.committed(worker, plan, step)
        cluster.checks.committed(worker, plan, step)


def test_a_commit_without_an_exchange_is_caught() -> None:
    cluster = started()
    with pytest.raises(Violation, match="by itself"):
        cluster.checks.committed(plan_of(cluster).workers[0], plan_of(cluster), 99)


def test_an_incomplete_batch_is_caught() -> None:
    cluster = started()
    whole = tuple(range(cluster.settings.model.micro_batches))
    cluster.checks.batch(4, whole)
    for micro_batches in (whole[1:], (*whole, 0)):
        with pytest.raises(Violation, match="made of the micro-batches"):
            cluster.checks.batch(4, tuple(sorted(micro_batches)))


def test_wrong_records_are_caught() -> None:
    cluster = started()
    checks, model = cluster.checks, cluster.settings.model
    step = checks.recorded + 1
    right = StepRecord(
        step=step,
        loss=reference(model).loss(step),
        grad_norm=0.0,
        learning_rate=0.0,
        samples=model.micro_batches,
        tokens=0,
        seconds=1.0,
        workers=1,
        generation=1,
        fingerprint=reference(model).fingerprint(step),
    )
    for wrong, message in (
        (replace(right, loss=right.loss + 1.0), "wrong loss"),
        (replace(right, fingerprint=1), "wrong fingerprint"),
        (replace(right, step=step - 1), "is recorded after step"),
    ):
        with pytest.raises(Violation, match=message):
            checks.record(wrong)
    checks.record(right)
    with pytest.raises(Violation, match="is recorded after step"):
        checks.record(right)


def test_steps_taken_back_without_a_great_loss_are_caught() -> None:
    cluster = started()
    while cluster.checks.recorded < 2:
        cluster.clock.step()
    with pytest.raises(Violation, match="taken back"):
        cluster.checks.take_back(0)
