"""The saved trace is what the Trace Event Format asks for, and says what the timeline says."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.watch.record import RunRecord
from jobs.watch.trace import WORKERS_PID
from runtime.run_folder import RunFolder
from runtime.spans import KINDS
from tests.support.made_run import make_run

NEEDED: dict[str, set[str]] = {
    "X": {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"},
    "i": {"name", "cat", "ph", "ts", "s", "pid", "tid", "args"},
    "C": {"name", "ph", "ts", "pid", "args"},
    "M": {"name", "ph", "pid", "tid", "args"},
}
METADATA = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path)


@pytest.fixture
def trace(folder: RunFolder, tmp_path: Path) -> dict[str, Any]:
    written = CliRunner().invoke(app, ["trace", str(folder.path), "-o", str(tmp_path / "trace.json")])
    assert written.exit_code == 0, written.output
    loaded: dict[str, Any] = json.loads((tmp_path / "trace.json").read_text())
    return loaded


def test_the_format(trace: dict[str, Any]) -> None:
    assert trace["displayTimeUnit"] == "ms"
    for event in trace["traceEvents"]:
        assert set(event) >= NEEDED[event["ph"]], event
        assert isinstance(event["pid"], int) and isinstance(event.get("tid", 0), int)
        if event["ph"] == "M":
            assert METADATA[event["name"]] in event["args"]
        else:
            assert event["ts"] >= 0 and event.get("dur", 0) >= 0
        if event["ph"] == "i":
            assert event["s"] == "g"
        if event["ph"] == "C":
            assert all(isinstance(value, float) for value in event["args"].values())


def test_every_row_has_a_name(trace: dict[str, Any]) -> None:
    named = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    used = {(event["pid"], event["tid"]) for event in trace["traceEvents"] if event["ph"] in "Xi"}
    assert used == set(named)
    assert named[WORKERS_PID, 4] == "worker 4"


def test_spans_lie_within_their_step_and_beside_each_other(trace: dict[str, Any]) -> None:
    rows: dict[int, list[dict[str, Any]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            rows.setdefault(event["tid"], []).append(event)
    for row in rows.values():
        steps = {event["args"]["step"]: event for event in row if event["cat"] == "step"}
        spans = sorted((event for event in row if event["cat"] != "step"), key=lambda event: event["ts"])
        for span in spans:
            around = steps[span["args"]["step"]]
            assert around["ts"] <= span["ts"]
            assert span["ts"] + span["dur"] <= around["ts"] + around["dur"] + 1e-3
        for one, other in pairwise(spans):
            assert one["ts"] + one["dur"] <= other["ts"] + 1e-3


def test_it_says_what_the_timeline_says(trace: dict[str, Any], folder: RunFolder) -> None:
    record = RunRecord(folder)
    record.follow()
    recorded = Counter(
        KINDS[kind] for line in record.timeline for flat in line["workers"].values() for kind in flat[::4]
    )
    drawn = Counter(event["cat"] for event in trace["traceEvents"] if event["ph"] == "X")
    steps = drawn.pop("step")
    assert drawn == recorded and steps == sum(len(line["workers"]) for line in record.timeline)
    told = [event["name"] for event in trace["traceEvents"] if event["ph"] == "i"]
    assert len(told) == len(record.events) and any(name.startswith("Recovered: worker 5") for name in told)


def test_a_run_without_a_timeline(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", "", {})
    refused = CliRunner().invoke(app, ["trace", str(tmp_path / "run"), "-o", str(tmp_path / "trace.json")])
    assert refused.exit_code == 2 and "has no timeline yet" in refused.output
    assert not (tmp_path / "trace.json").exists()
