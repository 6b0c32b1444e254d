"""The command `reknit simulate`: traces, fleets, schedules and replays, at small sizes."""

from __future__ import annotations

import io
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from jobs.schedules import replay, run_schedules
from jobs.simulate import SAMPLE_TRACE, real_planner, simulate
from runtime.control.recovery import Recovery
from runtime.plan import Plan
from runtime.signals import Terms
from runtime.simulation.fleet import Fleet
from runtime.simulation.fleet_report import FleetReport, FleetSettings
from runtime.simulation.toy import toy_layout
from runtime.simulation.trace import NOTICE_SECONDS, Entry, read_trace, rows, spot_trace

LAYOUT = toy_layout(4, 1024)


def play(
    trace: list[Entry],
    *,
    workers: int = 8,
    stages: int = 2,
    seconds: float = 200.0,
    per_node: int = 2,
    checkpoint_seconds: float = 60.0,
) -> FleetReport:
    terms = Terms("t", LAYOUT, steps=1 << 40, workers=workers, min_workers=1, max_workers=workers)
    settings = FleetSettings(
        terms, 2 * workers, workers_per_node=per_node, checkpoint_seconds=checkpoint_seconds
    )
    chooser, *_ = real_planner(LAYOUT, 2 * workers, stages)
    return Fleet(settings, chooser, trace).play(seconds)


# --- fleets ---------------------------------------------------------------------------------


def test_an_undisturbed_fleet_loses_nothing() -> None:
    report = play([])
    assert (report.recovery_seconds, report.changes, report.repeated_steps) == ([], 0, 0)
    assert report.steps > 100 and report.least_workers == 8
    assert 0.98 < report.goodput <= 1.0


def test_a_lost_node_costs_one_recovery_and_comes_back() -> None:
    report = play([Entry(20.03, "lost", 0.0), Entry(60.0, "back", 0.0)])
    assert (report.lost_nodes, report.lost_workers, report.joined) == (1, 2, 2)
    assert len(report.recovery_seconds) == 1 and report.from_checkpoint == 0
    assert report.taken_back == 0 and report.least_workers == 6
    assert report.changes >= 1  # the newcomers come in at a step boundary
    assert report.goodput < 1.0
    assert len(report.deciding) == len(report.planning) >= 3


def test_a_notice_costs_no_recovery() -> None:
    report = play([Entry(20.03, "notice", 0.0), Entry(20.03 + NOTICE_SECONDS, "lost", 0.0)])
    assert report.recovery_seconds == [] and report.repeated_steps == 0
    assert (report.released, report.least_workers) == (2, 6)
    assert report.lost_workers == 0


def test_two_nodes_at_once_go_back_to_the_newest_checkpoint() -> None:
    both = [Entry(100.03, "lost", 0.0), Entry(100.03, "lost", 0.26)]
    report = play(both, workers=4, per_node=1, stages=1)
    assert (report.from_checkpoint, len(report.recovery_seconds)) == (1, 1)
    assert report.taken_back > 0 and report.repeated_steps >= report.taken_back
    alone = play(both[:1], workers=4, per_node=1, stages=1)
    assert alone.from_checkpoint == 0 and alone.goodput > report.goodput


def test_what_is_done_again_does_not_count() -> None:
    both = [Entry(100.03, "lost", 0.0), Entry(100.03, "lost", 0.26)]
    report = play(both, workers=4, per_node=1, stages=1, checkpoint_seconds=inf)
    assert report.from_checkpoint == 0 and report.taken_back == report.repeated_steps > 100
    assert 80.0 < report.productive < 100.0  # all before the loss is done again


def test_the_same_trace_gives_the_same_history() -> None:
    trace = spot_trace(300.0, 120.0, seed=3)
    reports = [play(trace, seconds=300.0) for _ in range(2)]
    histories = [(r.lost_workers, r.joined, r.released, r.from_checkpoint, r.least_workers) for r in reports]
    assert histories[0] == histories[1] and reports[0].lost_nodes > 0


def short_trace(folder: Path) -> Path:
    """One node is lost, and one is taken away with a notice."""
    entries = [Entry(60.0, "notice", 0.3), Entry(90.0, "lost", 0.3), Entry(95.5, "lost", 0.6)]
    path = folder / "short.csv"
    path.write_text("\n".join(rows(entries)) + "\n")
    return path


def test_simulate_prints_what_came_of_it(tmp_path: Path) -> None:
    output = io.StringIO()
    trace = short_trace(tmp_path)
    report = simulate(8, trace, workers_per_node=2, stages=2, console=Console(file=output, width=120))
    assert report.lost_nodes == len(report.recovery_seconds) == 1 and report.released == 2
    assert report.goodput > 0.5
    text = output.getvalue()
    for what in ("8 simulated workers", f"{report.goodput:.1%}", "recoveries", "planning alone"):
        assert what in text


def test_a_planner_that_forgets_a_shard_is_caught() -> None:
    chooser, *_ = real_planner(LAYOUT, 8, 1)

    def forgetful(*arguments: object) -> Plan:
        plan = chooser(*arguments)  # type: ignore[arg-type]
        return replace(plan, shards=plan.shards[1:])

    terms = Terms("t", LAYOUT, steps=9, workers=4, min_workers=1)
    with pytest.raises(AssertionError, match="not one owner"):
        Fleet(FleetSettings(terms, 8), forgetful, []).play(10.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "make no cluster"),
        ({"workers": 4, "workers_per_node": 0}, "make no cluster"),
        ({"workers": 4, "min_workers": 5}, "between 1 and 4"),
        ({"workers": 4, "trace": SAMPLE_TRACE, "seed": 1}, "not both"),
    ],
)
def test_mistakes_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(**arguments)  # type: ignore[arg-type]


# --- traces ---------------------------------------------------------------------------------


def test_the_sample_is_what_it_says_it_is() -> None:
    assert read_trace(SAMPLE_TRACE) == spot_trace(seconds=1200, losses_per_hour=60, seed=1)


def test_a_trace_survives_writing_and_reading(tmp_path: Path) -> None:
    entries = spot_trace(900.0, 40.0, seed=5)
    path = tmp_path / "trace.csv"
    path.write_text("# a comment\n" + "\n".join(rows(entries)) + "\n")
    assert read_trace(path) == entries
    assert {entry.event for entry in entries} == {"notice", "lost", "back"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("time,event,node\n", "line 1: begin the table with time_s,event,node"),
        ("time_s,event,node\n1.0,lost\n", "line 2: 2 values; give 3"),
        ("# c\ntime_s,event,node\n1.0,gone,0.5\n", "line 3: 'gone' is no event"),
        ("time_s,event,node\nsoon,lost,0.5\n", "must be numbers"),
        ("time_s,event,node\n1.0,lost,1.0\n", "node lies between 0 and 1"),
        ("time_s,event,node\n-1.0,lost,0.5\n", "must not be negative"),
        ("time_s,event,node\nnan,lost,0.5\n", "must not be negative"),
    ],
)
def test_a_broken_trace_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(path)


# --- schedules and replays ------------------------------------------------------------------


def test_schedules_count_what_they_did() -> None:
    output = io.StringIO()
    assert run_schedules(3, 20, Console(file=output, width=200)) == []
    assert "3 schedules, 0 failed" in output.getvalue() and "recoveries" in output.getvalue()


def test_a_failing_seed_is_named_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recovery, "_decide", lambda self, now: [])  # nobody goes on after a loss
    output = io.StringIO()
    failed = run_schedules(6, 7, Console(file=output, width=200))
    assert failed and all(f"reknit simulate --replay {seed}" in output.getvalue() for seed in failed)
    account = io.StringIO()
    assert not replay(failed[0], Console(file=account, width=200))
    text = account.getvalue()
    assert "****" in text and "Interrupt" in text and "no end within" in text
    monkeypatch.undo()
    assert replay(failed[0], Console(file=io.StringIO()))


def test_the_command(tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["simulate", "--schedules", "2", "--seed", "4"])
    assert (result.exit_code, "2 schedules, 0 failed" in result.stdout) == (0, True)
    result = runner.invoke(app, ["simulate", "--replay", "4"])
    assert (result.exit_code, "nothing violated" in result.stdout) == (0, True)
    result = runner.invoke(app, ["simulate", "--workers", "8", "--trace", str(short_trace(tmp_path))])
    assert (result.exit_code, "8 simulated workers" in result.stdout) == (0, True)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--workers", "8", "--replay", "1"], ["--schedules", "0"], ["--trace", "x", "--workers", "8"]],
)
def test_the_command_refuses_mistakes(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["simulate", *arguments]).exit_code == 2


def test_the_command_fails_where_a_schedule_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recovery, "_decide", lambda self, now: [])
    assert CliRunner().invoke(app, ["simulate", "--schedules", "6", "--seed", "7"]).exit_code == 1
