"""What is shown of a record: the state, the figures, the curves, and the plans around an event."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.watch.record import Books, Happened, RunRecord, Step
from jobs.watch.view import charts, current_plan, events, paces, shares, state_of, summary, thinned
from runtime.events import (
    Event,
    Paused,
    Recovered,
    RecoverySeconds,
    RunFinished,
    RunStarted,
    StepRepeated,
    WorkerLost,
)
from runtime.run_folder import RunFolder
from runtime.spans import FORWARD, WAIT
from tests.support.made_run import JOINED_AT, LOST_AT, STEPS, make_run

STARTED = RunStarted("run", 10, 2, 1)
LOST = WorkerLost(3, 1, "process died")
BACK = Recovered(3, (1,), "process died", 2, 1, RecoverySeconds(0, 0, 0, 0, 0), "peers", 2, 0)


def step(number: int, *, at: float, generation: int = 1, loss: float = 1.0, seconds: float = 0.1) -> Step:
    return Step(number, loss, None, 100, seconds, 2, generation, at)


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return RunRecord(RunFolder.create(tmp_path / "run", "", {}))


@pytest.mark.parametrize(
    ("happened", "state"),
    [
        ([], "starting"),
        ([STARTED], "running"),
        ([STARTED, LOST], "recovering"),
        ([STARTED, WorkerLost(3, 1, "went", idle=True)], "running"),
        ([STARTED, LOST, BACK], "running"),
        ([STARTED, LOST, Paused(3, 1, 2)], "paused"),
        ([STARTED, RunFinished("interrupted", 3, 2, 1.0, 0.5)], "interrupted"),
        ([STARTED, RunFinished("failed", 3, 2, 1.0, 0.5, "why"), STARTED], "running"),
    ],
)
def test_state(record: RunRecord, happened: list[Event], state: str) -> None:
    record.events = [Happened(100.0 + number, event) for number, event in enumerate(happened)]
    record.steps[1] = step(1, at=104.0)
    assert state_of(record, 105.0)[0] == state


def test_a_run_that_nothing_is_heard_of_is_silent(record: RunRecord) -> None:
    record.events = [Happened(100.0, STARTED)]
    record.steps[1] = step(1, at=101.0, seconds=2.0)
    assert state_of(record, 120.0)[0] == "running", "ten of its steps are not over"
    state, detail = state_of(record, 122.0)
    assert state == "silent" and "since step 1" in detail


def test_figures(record: RunRecord) -> None:
    record.events = [Happened(100.0, STARTED)]
    record.steps = {n: step(n, at=100.0 + n) for n in (1, 2, 3)}
    record.books = [Books(103.0, 0.6, {"initialisation": 2.0, "productive": 3.0})]
    figures = summary(record, 104.0)
    assert (figures["step"], figures["steps"], figures["goodput"]) == (3, 10, 0.6)
    assert (figures["started"], figures["elapsed"]) == (98.0, 6.0)
    # the first step's 0.1 s, then one a second
    assert figures["tokens_per_second"] == pytest.approx(300 / 2.1)


def test_the_time_between_two_commits_counts_whatever_happened_in_it() -> None:
    steps = [step(1, at=10.0), step(2, at=10.5), step(3, at=14.0), step(4, at=14.0)]
    assert [passed for _, passed in paces(steps)] == [0.1, 0.5, 3.5, 0.1]


@given(
    st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=400),
    st.integers(4, 60),
)
def test_thinned_keeps_ends_and_peaks(values: list[float | None], limit: int) -> None:
    points = [(float(x), y) for x, y in enumerate(values)]
    kept = thinned(points, limit)
    assert set(kept) <= set(points) and kept == sorted(kept, key=lambda point: point[0])
    assert len(kept) <= limit + 2
    known = [y for y in values if y is not None]
    if points:
        assert kept[0] == points[0] and kept[-1] == points[-1]
    if known:
        shown = [y for _, y in kept if y is not None]
        assert (min(shown), max(shown)) == (min(known), max(known))


def test_a_loss_that_is_no_number_is_a_gap(record: RunRecord) -> None:
    record.steps = {n: step(n, at=float(n), loss=[1.0, math.nan, math.inf][n - 1]) for n in (1, 2, 3)}
    assert charts(record)["loss"] == {"x": [1, 2, 3], "y": [1.0, None, None]}


def test_plans_before_and_after_each_event(tmp_path: Path) -> None:
    record = RunRecord(make_run(tmp_path))
    record.follow()
    listed = {each["kind"]: each for each in events(record)}
    assert (listed["RunStarted"]["before"], listed["RunStarted"]["after"]) == (None, 1)
    for kind in ("WorkerLost", "Recovered"):
        assert (listed[kind]["step"], listed[kind]["before"], listed[kind]["after"]) == (LOST_AT, 1, 2)
        assert listed[kind]["workers"] == [5]
    joined = listed["WorkerJoined"]
    assert (joined["step"], joined["before"], joined["after"]) == (JOINED_AT - 1, 2, 3)
    assert listed["RunFinished"]["before"] == listed["RunFinished"]["after"] == 3
    assert listed["CheckpointWritten"]["tone"] == "quiet"
    assert listed["Recovered"]["text"].startswith("worker 5 lost"), "the step has a column of its own"
    plan = current_plan(record)
    assert plan is not None and plan["generation"] == 3


def test_steps_that_a_loss_took_back_are_not_those_before_it(record: RunRecord) -> None:
    record.events = [Happened(1.0, replace(BACK, from_version=1))]
    record.steps = {n: step(n, at=float(n), generation=1 if n == 1 else 2) for n in (1, 2, 3, 4)}
    record.plans = {1: {}, 2: {}}
    (listed,) = events(record)
    assert (listed["before"], listed["after"]) == (1, 2)


def test_an_event_that_changes_nothing(record: RunRecord) -> None:
    record.events = [Happened(1.0, StepRepeated(2, 2))]
    record.steps = {n: step(n, at=float(n)) for n in (1, 2, 3)}
    record.plans = {1: {}}
    (listed,) = events(record)
    assert (listed["before"], listed["after"]) == (1, 1)


def test_shares_are_of_the_whole_step() -> None:
    line = {"workers": {"0": [FORWARD, 0, 0, 50, WAIT, -1, 50, 30], "4": [FORWARD, 1, 20, 80]}}
    assert shares(line) == {
        0: {"forward": 0.5, "wait": 0.3, "idle": pytest.approx(0.2)},
        4: {"forward": 0.8, "idle": pytest.approx(0.2)},
    }


def test_a_run_of_a_version_without_plans_and_times(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for path in (folder.plans_file, folder.goodput_file, folder.timeline_file):
        path.unlink()
    record = RunRecord(folder)
    record.follow()
    figures = summary(record, 0.0)
    assert (figures["step"], figures["goodput"], figures["stages"]) == (STEPS, None, None)
    assert current_plan(record) is None and charts(record)["goodput"] == {"x": [], "y": []}
    assert all(each["before"] is None for each in events(record))
