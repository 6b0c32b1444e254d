"""The goodput bench's trace and accounting, the recovery bench's other faults. Nothing is timed here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jobs.assembly import build_data, data_arguments
from jobs.bench.faults import FaultRow, pause
from jobs.bench.goodput import (
    BATCH,
    KILL_EVERY,
    NEWCOMER_AFTER,
    PLACES,
    RAY_TRAIN,
    RECIPE,
    REKNIT,
    TORCHFT,
    TORCHFT_DEALT,
    WINDOW_SECONDS,
    Measured,
    report,
)
from jobs.bench.goodput_trace import Account, Change, Step, account, calls, final, place_seconds, trace
from jobs.bench.kills import Commit, Recovery, summary
from jobs.bench.places import descendants
from jobs.bench.ray_train_peer import new_commits, ray_train_sets
from jobs.bench.report import show
from jobs.bench.struck import stopped
from jobs.bench.witness import commits_seen, witnessed

HEADLINES = {"reknit_goodput", "ratio_to_torchft", "ratio_to_ray_train"}


def test_the_trace_takes_places_in_turn_and_gives_them_back() -> None:
    assert trace(4, 40.0, 10.0, 15.0) == (
        Change(10.0, 0, given_back=False),
        Change(20.0, 1, given_back=False),
        Change(25.0, 0, given_back=True),
        Change(30.0, 2, given_back=False),
        Change(35.0, 1, given_back=True),
    )


@given(
    places=st.integers(1, 12),
    window=st.integers(1, 300),
    kill_every=st.integers(1, 40),
    newcomer_after=st.integers(1, 40),
)
def test_a_place_is_taken_only_while_it_is_there(
    places: int, window: int, kill_every: int, newcomer_after: int
) -> None:
    if newcomer_after >= places * kill_every:
        with pytest.raises(ValueError, match="take more places"):
            trace(places, window, kill_every, newcomer_after)
        return
    there = set(range(places))
    changes = trace(places, window, kill_every, newcomer_after)
    assert [change.at for change in changes] == sorted(change.at for change in changes)
    assert all(0 < change.at < window for change in changes)
    for change in changes:
        assert (change.place in there) is not change.given_back
        there ^= {change.place}
    assert sum(not change.given_back for change in changes) == (window - 1) // kill_every


@given(places=st.integers(2, 8), window=st.integers(1, 100))
def test_place_seconds_are_those_of_every_single_second(places: int, window: int) -> None:
    changes = trace(places, window, 10.0, 15.0)
    by_second = 0
    for second in range(window):
        gone = sum(1 if not change.given_back else -1 for change in changes if change.at <= second)
        by_second += places - gone
    assert place_seconds(changes, places, window) == by_second


def test_a_place_that_takes_long_to_boot_is_called_for_before_an_earlier_kill() -> None:
    kill, back = Change(20.0, 1, given_back=False), Change(22.0, 0, given_back=True)
    assert calls([kill, back], 0.5) == [(20.0, kill), (21.5, back)]
    assert calls([kill, back], 3.0) == [(19.0, back), (20.0, kill)]


def test_a_step_counts_once_and_when_it_was_last_done() -> None:
    steps = [Step(1, 1.0, 8, 4), Step(2, 2.0, 8, 4), Step(3, 3.0, 8, 4), Step(2, 9.0, 8, 3)]
    assert final(steps) == [Step(1, 1.0, 8, 4), Step(3, 3.0, 8, 4), Step(2, 9.0, 8, 3)]


def calm(seconds: int) -> list[Step]:
    """A step each second, from 100 on."""
    return [Step(k, 100.0 + k, 8, 4) for k in range(seconds)]


def test_an_undisturbed_system_reaches_the_ideal() -> None:
    found = account(calm(21), [], begin=100.0, window=20.0, places=4, batch=8)
    assert found == Account(
        window=20.0, rate=8.0, at_batch=160, committed=160, lent=1.0, at_work=1.0, longest_gap=1.0
    )
    assert found.goodput == found.generous == found.of_full_strength == 1.0


def test_smaller_batches_count_only_generously() -> None:
    steps = calm(11) + [Step(11 + k, 111.0 + k, 6, 3) for k in range(10)]
    changes = [Change(10.0, 0, given_back=False)]
    found = account(steps, changes, begin=100.0, window=20.0, places=4, batch=8)
    assert (found.at_batch, found.committed, found.lent, found.at_work) == (80, 140, 0.875, 0.875)
    assert found.goodput == 80 / 140
    assert found.generous == 1.0
    assert found.of_full_strength == 0.5


def test_the_ideal_of_a_whole_batch_system_shrinks_with_its_places() -> None:
    # half of the places are gone from 10 s on, and a step takes twice as long
    steps = calm(11) + [Step(11 + k, 112.0 + 2 * k, 8, 2) for k in range(5)]
    changes = [Change(10.0, 0, given_back=False), Change(10.0, 1, given_back=False)]
    found = account(steps, changes, begin=100.0, window=20.0, places=4, batch=8)
    assert (found.goodput, found.of_full_strength, found.longest_gap) == (1.0, 0.75, 2.0)


def test_what_is_rolled_back_at_the_end_of_the_window_is_not_counted() -> None:
    steps = calm(21)
    redone = [replace(step, at=step.at + 10.0) for step in steps if step.number > 15]
    found = account(steps + redone, [], begin=100.0, window=20.0, places=4, batch=8)
    assert found.at_batch == 15 * 8


def test_a_run_that_begins_anew_keeps_its_undisturbed_rate() -> None:
    changes = [Change(10.0, 0, given_back=False)]
    anew = [replace(step, at=step.at + 15.0) for step in calm(6)]
    found = account(calm(11) + anew, changes, begin=100.0, window=20.0, places=4, batch=8)
    assert (found.rate, found.at_batch) == (8.0, (5 + 6) * 8)
    forgotten = account(anew, changes, begin=100.0, window=20.0, places=4, batch=8, undisturbed=calm(11))
    assert (forgotten.rate, forgotten.at_batch) == (8.0, 6 * 8)


def test_a_worker_is_at_work_when_a_step_has_its_share() -> None:
    # lent again after 12 s, but only the steps after 16 s have four workers
    steps = [*calm(11), *(Step(k, 100.0 + k, 8, 3 if k <= 16 else 4) for k in range(11, 21))]
    changes = [Change(10.0, 0, given_back=False), Change(12.0, 0, given_back=True)]
    found = account(steps, changes, begin=100.0, window=20.0, places=4, batch=8)
    assert (found.lent, found.at_work) == (78 / 80, 74 / 80)


def test_a_stall_up_to_the_end_is_a_gap() -> None:
    assert account(calm(6), [], begin=100.0, window=20.0, places=4, batch=8).longest_gap == 15.0


def test_a_rate_needs_steps_before_the_first_kill() -> None:
    changes = [Change(1.5, 0, given_back=False)]
    with pytest.raises(ValueError, match="make a step shorter"):
        account(calm(20), changes, begin=100.0, window=20.0, places=4, batch=8)


def test_the_bench_lends_less_than_three_quarters() -> None:
    changes = trace(PLACES, WINDOW_SECONDS, KILL_EVERY, NEWCOMER_AFTER)
    lent = place_seconds(changes, PLACES, WINDOW_SECONDS) / (PLACES * WINDOW_SECONDS)
    assert 0.6 < lent < 0.75
    assert min(_there(changes)) == PLACES - 2


def _there(changes: tuple[Change, ...]) -> list[int]:
    there, counts = PLACES, []
    for change in changes:
        there += 1 if change.given_back else -1
        counts.append(there)
    return counts


def brought(goodput: float) -> Account:
    """Of 1,000 samples that two thirds of the places could have brought."""
    return Account(60.0, 25.0, round(1000 * goodput), 1000, 1000 / 1500, 0.6, 1.0)


def test_the_report_holds_the_headline_and_survives_json() -> None:
    whole = report(
        [
            Measured(REKNIT, brought(0.92)),
            Measured(TORCHFT, brought(0.23)),
            Measured(TORCHFT_DEALT, brought(0.69)),
            Measured(RAY_TRAIN, None, "its workers did not train together"),
        ]
    )
    assert whole.headline.keys() == HEADLINES
    assert whole.headline["reknit_goodput"] == pytest.approx(0.92)
    assert whole.headline["ratio_to_torchft"] == pytest.approx(4.0)
    assert whole.headline["ratio_to_ray_train"] is None
    assert whole.met
    assert json.loads(json.dumps(asdict(whole)))["headline"].keys() == HEADLINES
    assert len({tuple(row) for row in whole.rows}) == 1
    assert [row["samples"] for row in whole.rows] == [920, 230, 690, None]
    page = StringIO()
    show(whole, Console(file=page, width=250))
    assert "the ratio is 1.33" in page.getvalue()
    assert "Ray Train, elastic: not measured: its workers did not train together" in page.getvalue()


@pytest.mark.parametrize(
    ("mine", "peer"),
    [
        (brought(0.89), brought(0.2)),
        (brought(0.95), brought(0.6)),
        (None, brought(0.2)),
        (brought(0.95), None),
    ],
    ids=["too little", "torchft too near", "not measured", "no peer"],
)
def test_the_goal_is_missed(mine: Account | None, peer: Account | None) -> None:
    whole = report([Measured(REKNIT, mine), Measured(TORCHFT, peer)])
    assert not whole.met
    assert whole.headline.keys() == HEADLINES


def test_a_peer_that_brought_nothing_has_no_ratio() -> None:
    whole = report([Measured(REKNIT, brought(0.9)), Measured(RAY_TRAIN, brought(0.0))])
    assert whole.headline["ratio_to_ray_train"] is None


def test_the_batch_divides_among_any_number_of_workers_that_the_trace_leaves() -> None:
    assert all(BATCH % workers == 0 for workers in range(PLACES - 2, PLACES + 1))


def commits(*times: float) -> list[Commit]:
    return [Commit(at, 0) for at in times]


def test_a_pause_is_the_longest_time_without_a_commit_after_the_fault() -> None:
    # the longest interval of all lies before the fault, the longest after it from 9 to 12
    found = pause(commits(0.0, 5.0, 6.0, 7.0, 8.0, 9.0, 12.0, 13.0), 7.5, 14.0)
    assert (found.seconds, found.undisturbed_seconds) == (2.0, 1.0)


def test_a_pause_lasts_to_the_end_where_nobody_commits_again() -> None:
    assert pause(commits(1.0, 2.0, 3.0, 4.0), 4.5, 14.5).seconds == 9.0


def test_whoever_goes_on_as_before_has_no_pause() -> None:
    assert pause(commits(*(float(k) for k in range(20))), 10.0, 15.0).seconds == 0.0


def test_a_pause_needs_steps_before_the_fault() -> None:
    with pytest.raises(ValueError, match="wait longer"):
        pause(commits(1.0, 5.0), 2.0, 9.0)


def test_rows_of_other_faults_have_the_columns_of_kills() -> None:
    went_on = FaultRow("a", (Recovery(1.0, 1.0, 0.1), Recovery(3.0, 3.0, 0.1)), 24)
    assert list(went_on.cells()) == list(summary("b", [], 1))
    assert (went_on.cells()["median_seconds"], went_on.cells()["batch_after"]) == (2.0, 24)
    assert FaultRow("b", (), None).cells()["batch_after"] is None


def test_ray_trains_steps_done_again_are_no_new_commits(tmp_path: Path) -> None:
    (tmp_path / "100.000.commits").write_text("1 100.5 8 4\n2 101.0 8 4\n3 101.5 8 4\n4 102.")
    (tmp_path / "200.000.commits").write_text("2 200.5 8 3\n3 201.0 8 3\n4 201.5 8 3\n5 202.0 8 3\n")
    (tmp_path / "200.000.workers").write_text("17 18 19")
    (tmp_path / "100.000.workers").write_text("11 12 13 14")
    sets = ray_train_sets(tmp_path)
    assert [(step.number, step.workers) for step in sets[0]] == [(1, 4), (2, 4), (3, 4)]
    assert [(step.number, step.workers) for step in sets[1]] == [(2, 3), (3, 3), (4, 3), (5, 3)]
    made = new_commits(sets)
    assert made == [Commit(100.5, 0), Commit(101.0, 0), Commit(101.5, 0), Commit(201.5, 1), Commit(202.0, 1)]


def test_a_witness_marks_each_step_once_and_changes_no_data(tmp_path: Path) -> None:
    recipe = witnessed(RECIPE, tmp_path)
    plain = build_data(RECIPE.data.build, data_arguments(RECIPE))
    data = build_data(recipe.data.build, data_arguments(recipe))
    for step, micro_batch in [(1, 0), (1, 1), (2, 0), (1, 0), (4, 3)]:
        pairs = zip(data.micro_batch(step, micro_batch), plain.micro_batch(step, micro_batch), strict=True)
        assert all(torch.equal(seen, other) for seen, other in pairs)
    (marks,) = tmp_path.iterdir()
    assert [line.split()[0] for line in marks.read_text().splitlines()] == ["1", "2", "4"]
    assert all(map(torch.equal, data.held_out(0), plain.held_out(0)))


def test_whoever_begins_a_step_first_tells_of_the_commit(tmp_path: Path) -> None:
    (tmp_path / "11.begun").write_text("1 10.0\n2 11.0\n3 12.5\n4 13.")
    (tmp_path / "12.begun").write_text("1 10.5\n2 10.75\n")
    assert commits_seen(tmp_path) == commits(10.0, 10.75, 12.5)


def test_a_process_that_hangs_does_not_stay_behind() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with stopped(process.pid):
            assert process.poll() is None
        assert process.wait() == -signal.SIGKILL


def test_descendants_are_children_and_their_children() -> None:
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
        "child.communicate()\n"
    )
    command = ["sh", "-c", f'"{sys.executable}" -c "$0"; true', script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None and shell.stdin is not None
        grandchild = int(shell.stdout.readline())
        found = descendants(shell.pid)
        shell.stdin.close()
    assert len(found) == 2 and found[-1] == grandchild
    assert descendants(shell.pid) == []
