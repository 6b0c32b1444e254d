"""A run's record is read as it grows, whatever becomes of its files meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.watch.record import RunRecord, Tail
from jobs.watch.source import source_of
from runtime import run_folder
from runtime.events import RunStarted
from runtime.run_folder import RunFolder
from tests.support.made_run import LOST_AT, STEPS, make_run


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "", {})


def followed(folder: RunFolder) -> tuple[Tail, list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    return Tail(folder, "events.jsonl", lines.append, lines.clear), lines


def test_each_line_once_and_a_torn_one_when_it_is_whole(folder: RunFolder) -> None:
    tail, lines = followed(folder)
    assert not tail.follow()
    folder.events_file.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert tail.follow() and lines == [{"a": 1}, {"a": 2}]
    assert not tail.follow()
    with folder.events_file.open("a") as stream:
        stream.write(": 3}\n")
    assert tail.follow() and lines == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_torn_line_that_a_new_controller_cuts_off(folder: RunFolder) -> None:
    tail, lines = followed(folder)
    folder.events_file.write_text('{"a": 1}\n{"a": 2')
    tail.follow()
    folder.events_file.write_text('{"a": 1}\n{"b": 5}\n')
    tail.follow()
    assert lines == [{"a": 1}, {"b": 5}]


def test_a_file_that_has_become_shorter_is_read_anew(folder: RunFolder) -> None:
    tail, lines = followed(folder)
    folder.events_file.write_text('{"a": 1}\n{"a": 2}\n')
    tail.follow()
    folder.events_file.write_text('{"b": 7}\n')
    assert tail.follow() and lines == [{"b": 7}]


def test_more_than_a_piece(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PIECE", 64)
    tail, lines = followed(folder)
    folder.events_file.write_text("".join(json.dumps({"number": n}) + "\n" for n in range(100)))
    tail.follow()
    assert [line["number"] for line in lines] == list(range(100))


def test_all_of_a_run(tmp_path: Path) -> None:
    record = RunRecord(make_run(tmp_path))
    record.follow()
    assert list(record.steps) == list(range(1, STEPS + 1))
    assert sorted(record.plans) == [1, 2, 3]
    assert isinstance(record.events[0].event, RunStarted)
    assert record.timeline[-1]["step"] == STEPS
    assert {LOST_AT - 1, LOST_AT, LOST_AT + 1} <= {line["step"] for line in record.timeline}
    assert record.unreadable == 0
    version = record.version
    record.follow()
    assert record.version == version, "nothing is new"


def test_steps_that_were_taken_back(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=10, finished=False)
    record = RunRecord(folder)
    record.follow()
    folder.supersede_steps(8)
    record.follow()
    assert list(record.steps) == list(range(1, 8))


def test_what_cannot_be_read_is_counted_and_left_out(folder: RunFolder) -> None:
    unknown = '{"time": 1.0, "kind": "OfAnotherVersion"}'
    folder.events_file.write_text(f'{unknown}\nnothing\n{{"kind": "RunStarted"}}\n')
    folder.steps_file.write_text('{"step": 1}\n')
    record = RunRecord(folder)
    record.follow()
    assert record.events == [] and record.steps == {} and record.unreadable == 4


def test_a_timeline_that_is_replaced_is_seen(folder: RunFolder) -> None:
    record = RunRecord(folder)
    folder.write_timeline('{"step": 1, "workers": {}}\n')
    record.follow()
    folder.write_timeline('{"step": 2, "workers": {}}\n')
    record.follow()
    assert [line["step"] for line in record.timeline] == [2] and record.timeline_version == 2
    folder.write_timeline('{"step": 3, "wor')  # as it looks where its pieces are of two
    record.follow()
    assert [line["step"] for line in record.timeline] == [2]


def test_no_such_run(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match="holds no run that was started on a Ray cluster")
    with refused, source_of(tmp_path):
        pass
