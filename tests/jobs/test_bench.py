"""The recovery bench's arithmetic and the form of its report. Nothing is timed here."""

from __future__ import annotations

import json
from dataclasses import asdict
from io import StringIO
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jobs.bench.kills import Commit, Recovery, phase_row, recovery, summary
from jobs.bench.recovery import RECIPE, Measurement, PeerMeasurement, report, same_bits
from jobs.bench.report import BenchReport, show

HEADLINES = {"median_seconds", "worst_seconds", "torchft_best_median_seconds"}


def commits(*pairs: tuple[float, int]) -> list[Commit]:
    return [Commit(at, losses) for at, losses in pairs]


def recovered(seconds: float) -> Recovery:
    return Recovery(seconds, seconds, 0.25)


def test_a_step_that_the_survivors_finish_does_not_count_as_recovered() -> None:
    made = commits((1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1), (7.0, 2), (8.0, 2))
    result = recovery(made, 3.5)
    assert result == Recovery(seconds=2.5, any_commit_seconds=-0.5, undisturbed_seconds=1.0)


def test_the_undisturbed_step_is_that_of_the_membership_the_kill_met() -> None:
    made = commits((0.0, 1), (0.5, 1), (1.0, 1), (10.0, 2), (12.0, 2), (14.0, 2), (20.0, 3))
    result = recovery(made, 15.0)
    assert result is not None
    assert (result.undisturbed_seconds, result.seconds) == (2.0, 3.0)


def test_members_that_come_together_at_the_start_are_no_losses() -> None:
    made = commits((0.0, 2), (1.0, 2), (2.0, 0), (3.0, 0), (6.0, 1))
    result = recovery(made, 3.5)
    assert result is not None and result.seconds == 1.5


def test_no_commit_after_the_kill_is_no_recovery() -> None:
    assert recovery(commits((1.0, 0), (2.0, 0), (3.0, 0)), 2.5) is None


def test_a_kill_needs_steps_before_it() -> None:
    with pytest.raises(ValueError, match="wait longer between kills"):
        recovery(commits((1.0, 0), (3.0, 1)), 2.0)


@given(
    interval=st.integers(1, 100),
    before=st.integers(2, 20),
    into=st.integers(0, 99),
    pause=st.integers(0, 1000),
)
def test_recovery_is_the_pause_and_the_work_that_was_lost(
    interval: int, before: int, into: int, pause: int
) -> None:
    into %= interval
    killed_at = (before - 1) * interval + into
    made = [Commit(float(k * interval), 0) for k in range(before)]
    made += [Commit(float(killed_at + pause + (k + 1) * interval), 1) for k in range(3)]
    result = recovery(made, float(killed_at))
    assert result is not None
    assert (result.seconds, result.undisturbed_seconds) == (pause, interval)


@given(st.lists(st.floats(-1, 100), min_size=1))
def test_a_row_has_median_and_worst(seconds: list[float]) -> None:
    row = summary("reknit", [recovered(each) for each in seconds], 24)
    assert (row["kills"], row["median_seconds"], row["worst_seconds"]) == (
        len(seconds),
        median(seconds),
        max(seconds),
    )


def test_rows_of_every_sort_have_the_same_columns() -> None:
    assert list(summary("a", [], 1)) == list(summary("b", [recovered(1.0)], 1)) == list(phase_row("c", [1.0]))


def test_equal_bits_are_counted_and_unequal_ones_refused() -> None:
    assert same_bits([{1: 10, 2: 20}, {1: 10, 2: 20, 3: 30}, {3: 30, 4: 40}]) == 3
    with pytest.raises(AssertionError, match="after step 2"):
        same_bits([{1: 10, 2: 20}, {1: 10, 2: 21}])


def measurement(*seconds: float) -> Measurement:
    mine = Measurement([recovered(each) for each in seconds], fingerprints=[{1: 5}, {1: 5}])
    for _ in seconds:
        mine.add_phases({"detect": 0.01, "move": 0.02})
    return mine


def test_the_report_holds_the_headline_and_survives_json() -> None:
    peers = [
        PeerMeasurement("torchft (default)", 3, (recovered(5.0),)),
        PeerMeasurement("torchft", 3, (recovered(0.3), recovered(0.2), None)),
        PeerMeasurement("torchft, 4", 4, (), "the replicas did not train together"),
    ]
    whole = report(measurement(*[0.05] * 9, 0.4), peers)
    assert whole.headline == {
        "median_seconds": 0.05,
        "worst_seconds": 0.4,
        "torchft_best_median_seconds": 0.25,
    }
    assert whole.met
    assert json.loads(json.dumps(asdict(whole)))["headline"].keys() == HEADLINES
    assert len({tuple(row) for row in whole.rows}) == 1
    batch = RECIPE.parallel.micro_batches * RECIPE.parallel.micro_batch_size
    after = [row["batch_after"] for row in whole.rows if row["batch_after"]]
    assert after == [batch, batch * 2 // 3, batch * 2 // 3, batch * 3 // 4]
    assert any("of 1 more kill" in note for note in whole.notes)
    assert any("did not train together" in note for note in whole.notes)
    page = StringIO()
    show(whole, Console(file=page, width=200))
    assert "torchft_best_median_seconds = 0.25" in page.getvalue()


@pytest.mark.parametrize(
    ("seconds", "peer"),
    [((0.05,) * 9, 0.2), ((0.16,) * 10, 0.2), ((0.05,) * 10, 0.04), ((0.05,) * 10, None)],
    ids=["too few kills", "too slow", "slower than the peer", "no peer"],
)
def test_the_goal_is_missed(seconds: tuple[float, ...], peer: float | None) -> None:
    peers = [] if peer is None else [PeerMeasurement("torchft", 3, (recovered(peer),))]
    whole = report(measurement(*seconds), peers)
    assert not whole.met
    assert whole.headline.keys() == HEADLINES
    assert (whole.headline["torchft_best_median_seconds"] is None) == (peer is None)


def test_rows_that_share_no_key_are_tables_of_their_own() -> None:
    rows = (
        {"what": "run", "seconds": 1.5},
        {"what": "peer", "of_peer": 1.0, "seconds": 2.0},
        {"what": "bytes", "kept": 8},
    )
    console = Console(file=StringIO(), width=100)
    show(BenchReport(bench="two", headline={}, goal="none", met=True, rows=rows), console)
    printed = console.file.getvalue()
    assert printed.count("what") == 2
    cells = {row[0].strip(): row[1:] for row in (line.strip("│").split("│") for line in printed.splitlines())}
    assert [cell.strip() for cell in cells["peer"]] == ["2", "1"]
    assert [cell.strip() for cell in cells["bytes"]] == ["8"]
