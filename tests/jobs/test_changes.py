"""The parts of the bench of changes that compute figures, and layers that say when they compute."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.bench import changes, joins, migrations, redo, traced, watched
from jobs.bench.joins import Joins
from jobs.bench.migrations import JOIN, LEAVE, Migration, Migrations
from jobs.bench.redo import Kill, Redone
from runtime.events import (
    DrainNotice,
    Event,
    Recovered,
    RecoverySeconds,
    StepRecord,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
)
from runtime.plan import Member, Plan, Stage
from runtime.run_folder import LoggedEvent
from strategies.model import build_model
from strategies.move import Mover
from strategies.sharding import shard_blocks


def record(
    step: int, committed_at: float, generation: int, workers: int = 4, samples: int = 16
) -> StepRecord:
    return StepRecord(
        step=step,
        loss=1.0,
        grad_norm=1.0,
        learning_rate=0.1,
        samples=samples,
        tokens=0,
        seconds=1.0,
        workers=workers,
        generation=generation,
        fingerprint=0,
        committed_at=committed_at,
    )


STEPS = [
    record(1, 10.0, 1),
    record(2, 11.0, 1),
    record(3, 12.0, 1),
    record(4, 15.0, 2, workers=3),
    record(5, 17.0, 2, workers=3),
    record(6, 18.25, 3),
    record(7, 19.25, 3),
    record(8, 20.5, 3),
]


def test_a_step_that_follows_a_change_is_compared_with_the_others_under_its_plan() -> None:
    assert watched.intervals(STEPS, 1) == [1.0, 1.0]
    assert watched.intervals(STEPS, 3) == [1.0, 1.25]
    assert watched.excess(STEPS, 2) == 3.0 - 2.0
    assert watched.excess(STEPS, 3) == 1.25 - 1.125
    with pytest.raises(ValueError, match="generation 1 has too few"):
        watched.excess(STEPS, 1)


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ([record(1, 1.0, 1), record(3, 2.0, 1)], "gaps"),
        ([record(1, 1.0, 1), record(1, 2.0, 1)], "twice"),
        ([record(1, 1.0, 1), record(2, 2.0, 1, samples=12)], "all 16 samples"),
    ],
)
def test_a_record_that_is_not_in_order_is_refused(steps: list[StepRecord], problem: str) -> None:
    watched.check(STEPS, 16)
    with pytest.raises(RuntimeError, match=problem):
        watched.check(steps, 16)


def test_joins_are_the_changes_to_more_workers() -> None:
    assert joins.joining(STEPS, 4) == [3]
    found = joins.joins_of(STEPS, [0.05, 0.25, 0.15], 4)
    assert found == Joins([0.05, 0.25, 0.15], [0.125], 1.0)
    assert found.share == 0.15


def plans() -> tuple[Plan, Plan]:
    """Of six layers: three workers at 4 : 2, and four at 3 : 3."""
    layers, loss = traced.build(layers=6, forward_seconds=0.0, parameters=640)
    layout = build_model(lambda: (layers, loss), 0).layout

    def plan(generation: int, stages: tuple[Stage, ...]) -> Plan:
        members = [Member(worker, "") for stage in stages for worker in stage.workers]
        assignment = tuple((stage.workers * 4)[:4] for stage in stages)
        return Plan(generation, stages, assignment, shard_blocks(layout, stages, members))

    return (
        plan(1, (Stage(0, 4, (0, 1)), Stage(4, 6, (2,)))),
        plan(2, (Stage(0, 3, (0, 1)), Stage(3, 6, (2, 3)))),
    )


def test_what_a_change_moves_follows_from_its_plans() -> None:
    three, four = plans()
    layers, loss = traced.build(layers=6, forward_seconds=0.0, parameters=640)
    layout = build_model(lambda: (layers, loss), 0).layout
    assert migrations.moved_layers(three, four) == 1
    assert migrations.moved_layers(four, three) == 1
    assert migrations.moved_layers(three, three) == 0
    found = migrations.migration(JOIN, layout, three, four, 0.5, 0.75, 0.25)
    layer_bytes = 4 * (640 + 64)
    # one layer to the worker that stays in the second stage, three to the newcomer
    assert found.parameter_bytes == 4 * layer_bytes
    assert found.total_bytes > 4 * layer_bytes
    assert (found.kind, found.pause, found.stood_still, found.excess) == (JOIN, 0.5, 0.75, 0.25)
    assert found.moved_layers == 1


def test_every_leave_and_join_is_paired_with_its_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "PARAMETERS", 640)
    three, four = plans()
    run = [replace(three, generation=1), replace(four, generation=2), replace(three, generation=3)]
    steps = [record(i + 1, 10.0 + i + (i >= 3), 1 + i // 3) for i in range(9)]
    events: list[Event] = [
        DrainNotice(1, 0, "told"),
        WorkerJoined(4, 3, 3, 4, 0.25),
        WorkerLeft(7, 3, "told", 4, 3, 0.5, 1.0),
    ]
    timeline = {
        step: {worker: [("optimizer", 0.0, 1.0), ("gather", 1.0, 1.5)] for worker in (0, 1, 2)}
        for step in range(1, 10)
    }
    for boundary, gone_on in ((3, 2.0), (6, 1.75)):
        for worker in (0, 1, 2):
            timeline[boundary + 1][worker].append(("recovery", 1.5, gone_on))
    found = migrations.migrations_of(steps, events, run, timeline)
    assert [(each.kind, each.pause) for each in found] == [(JOIN, 0.5), (LEAVE, 0.25)]
    assert [(each.stood_still, each.excess) for each in found] == [(0.25, 1.0), (0.5, 0.0)]
    with pytest.raises(ValueError, match="zip"):
        migrations.migrations_of(steps, events[:2], run, timeline)


def test_a_pause_is_what_a_change_adds_to_a_boundary() -> None:
    three, four = plans()
    steps = [record(step, 10.0 + step, 1 if step < 4 else 2) for step in range(1, 6)]

    def boundary(updated: float, gathered: float) -> list[tuple[str, float, float]]:
        return [("optimizer", 0.0, updated), ("gather", updated, gathered)]

    timeline = {
        1: {0: boundary(10.5, 11.0), 1: boundary(10.0, 10.5), 2: boundary(10.0, 10.0)},  # the usual: 0.5
        2: {0: boundary(20.0, 20.5), 1: boundary(20.0, 20.5), 2: boundary(19.0, 19.0)},
        # worker 2 reaches the boundary first; the others' gathering takes longer because they send as well
        3: {0: boundary(30.0, 30.75), 1: boundary(30.0, 31.0), 2: boundary(29.0, 29.0)},
        4: {
            0: [("recovery", 30.75, 30.875)],
            1: [("recovery", 31.0, 31.125)],
            2: [("recovery", 29.0, 31.25)],
        },
    }
    timeline[4][3] = [("recovery", 25.0, 40.0)]  # a newcomer
    assert migrations.pause_of(timeline, steps, three, four) == 31.25 - 30.0 - 0.5
    late = {step: spans for step, spans in timeline.items() if step > 2}
    with pytest.raises(ValueError, match="what to compare it with"):
        migrations.pause_of(late, steps, three, four)
    del timeline[4][1]
    with pytest.raises(ValueError, match="the change after step 3"):
        migrations.pause_of(timeline, steps, three, four)


def test_a_line_of_the_timeline_is_read_as_seconds() -> None:
    gather, recovery = watched.KINDS.index("gather"), watched.KINDS.index("recovery")
    line = {"began": 100.0, "workers": {"3": [gather, -1, 500_000, 250_000, recovery, -1, 750_000, 250_000]}}
    assert watched.spans_of(line) == {3: [("gather", 100.5, 100.75), ("recovery", 100.75, 101.0)]}


def of(kind: str, pause: float) -> Migration:
    return Migration(kind, pause, 0.0, 0.0, 1, 4_000_000, 12_000_000)


MOVED = Migrations(
    ahead=[of(LEAVE, 0.25), of(JOIN, 0.125), of(LEAVE, 0.5), of(JOIN, 0.25), of(LEAVE, 0.125)],
    at_once=[of(LEAVE, 4.0), of(JOIN, 1.0), of(LEAVE, 2.0), of(JOIN, 2.0), of(LEAVE, 1.0)],
)


def test_each_kind_of_migration_is_compared_with_itself() -> None:
    assert MOVED.share(LEAVE) == 0.125
    assert MOVED.share(JOIN) == 0.125
    slower = Migrations(MOVED.ahead, [of(LEAVE, 1.0), of(JOIN, 3.0)])
    assert slower.worst_share == 0.25


def log(killed_at: float) -> list[LoggedEvent]:
    seconds = RecoverySeconds(detect=0.0, agree=0.125, plan=0.0625, move=0.0625, redo=9.0)
    recovered = Recovered(4, (2,), "killed", 4, 3, seconds, "peers", 3, 0, kept=0.75)
    return [
        LoggedEvent(1.0, WorkerLost(1, 7, "an earlier one")),
        LoggedEvent(killed_at + 0.25, WorkerLost(4, 2, "killed")),
        LoggedEvent(killed_at + 0.5, recovered),
    ]


def test_redo_is_what_remains_when_the_usual_step_and_the_recovery_are_taken_away() -> None:
    ledger = [(11.25, 12.5), (12.5, 12.75), (12.875, math.inf)]
    kill = redo.interrupted(STEPS, log(13.0), 13.0, ledger)
    # the step took from 12.0 to 15.0, the one before from 11.0; 0.75 s of the first sleep were in that one
    assert kill == Kill(
        redo=3.0 - 1.0 - 0.5, lost_share=0.75, computed=0.875, recovery=0.5, step_seconds=1.0, kept=0.75
    )


def test_a_kill_that_met_no_step_under_way_does_not_count() -> None:
    assert redo.interrupted(STEPS, log(11.9), 11.9, []) is None
    with pytest.raises(ValueError, match="no recovery"):
        redo.interrupted(STEPS, log(13.0)[:2], 13.0, [])


def test_a_worker_passes_forward_and_backward_through_each_of_its_layers() -> None:
    three, _ = plans()
    assert [redo.passes(three, worker) for worker in three.workers] == [2 * 4 * 2, 2 * 4 * 2, 2 * 2 * 4]


def kill(ratio: float) -> Kill:
    return Kill(redo=ratio, lost_share=1.0, computed=0.9, recovery=0.1, step_seconds=1.0, kept=0.8)


REDONE = Redone([kill(0.5)] * 2 + [kill(1.0)] * 3, [kill(1.5)] * 5)


def test_the_report_judges_all_three_parts() -> None:
    joined = Joins([0.0625] * 10, [0.125] * 10, 1.0)
    report = changes.report(joined, MOVED, REDONE)
    assert report.met
    assert report.headline == {
        "join_pause_of_step": 0.0625,
        "migration_pause_of_at_once": 0.125,
        "salvage_redo_of_share": 1.0,
        "redo_without_salvage_of_share": 1.5,
    }
    assert len({tuple(row) for row in report.rows}) == 1, "all rows have the same columns"
    at_once = next(row for row in report.rows if row["what"] == "migration, leave: all at once")
    assert (at_once["pause_ms"], at_once["moved_mb"]) == (2000.0, 12.0)
    slow_join = Joins([0.125] * 10, [0.125] * 10, 1.0)
    slow_move = Migrations(MOVED.at_once, MOVED.at_once)
    slow_redo = Redone([kill(1.2)] * 5, REDONE.anew)
    assert not changes.report(slow_join, MOVED, REDONE).met
    assert not changes.report(joined, slow_move, REDONE).met
    assert not changes.report(joined, MOVED, slow_redo).met
    assert not changes.report(Joins([0.0625] * 9, [0.0] * 9, 1.0), MOVED, REDONE).met
    assert not changes.report(joined, MOVED, Redone(REDONE.salvaged[:4], REDONE.anew)).met


def test_a_ledger_knows_of_a_sleep_that_never_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [layer], _ = traced.build(layers=1, forward_seconds=0.25, parameters=130, ledger=str(tmp_path))
    assert [tuple(parameter.shape) for parameter in layer.parameters()] == [(64,), (2, 64)]
    clock = iter([100.0, 100.5, 101.0])
    monkeypatch.setattr("time.time", lambda: next(clock))

    def killed(seconds: float) -> None:
        if seconds == 0.5:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", killed)
    output = layer(torch.ones(1, 64)).sum()
    with pytest.raises(KeyboardInterrupt):
        output.backward()
    found = traced.entries(tmp_path, os.getpid())
    assert found == [(100.0, 100.5), (101.0, math.inf)]
    assert traced.computed(found, 100.125, 101.25) == 0.375 + 0.25


def test_moving_everything_at_once_waits_but_tells_no_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(Mover, "move", Mover.move)  # put back afterwards
    monkeypatch.setattr(traced, "_move", lambda mover: calls.append("move"))
    mover = Mover.__new__(Mover)
    mover.on_settled = lambda: calls.append("told")
    mover._settled = False

    def settle(*, wait: bool) -> None:
        calls.append(f"settle {wait}")
        mover.on_settled()
        mover._settled = True

    monkeypatch.setattr(mover, "settle", settle, raising=False)
    traced.build(layers=1, forward_seconds=0.0, at_once=True)
    mover.move()
    assert calls == ["move", "settle True"] and not mover._settled
    mover.settle(wait=False)
    assert calls[2:] == ["settle False", "told"]


def test_the_recipes_are_valid(tmp_path: Path) -> None:
    recipe = watched.recipe("x", 4, 8, 0.01, parameters=64, ledger=str(tmp_path), at_once=False)
    assert recipe.parallel.max_workers == recipe.parallel.workers == 4
    assert not recipe.parallel.rebalance and recipe.salvage
