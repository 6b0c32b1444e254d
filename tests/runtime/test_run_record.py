"""Plans, goodput and timeline in the run folder, and the pieces in which a record is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from runtime import run_folder
from runtime.goodput import Ledger
from runtime.run_folder import RunFolder, read_json_lines
from tests.support.made_run import made_plan


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "", {"seed": 1})


def test_a_plan_says_who_does_what(folder: RunFolder) -> None:
    folder.log_plan(replace(made_plan(3, (0, 1, 2, 3), 2, 6), teams=((0, 2),)), 12.5)
    (line,) = read_json_lines(folder.plans_file)[0]
    assert line["time"] == 12.5 and line["generation"] == 3
    assert line["stages"] == [
        {"first": 0, "stop": 3, "workers": [0, 2]},
        {"first": 3, "stop": 6, "workers": [1, 3]},
    ]
    assert line["assignment"] == [[0, 2, 0, 2, 0, 2], [1, 3, 1, 3, 1, 3]]
    assert line["teams"] == [[0, 2]]
    assert line["shards"]["2"] == {"owned": 9600, "kept": 9600, "backups": [0]}


def test_books_say_where_the_time_went(folder: RunFolder) -> None:
    ledger = Ledger.begin(0).enter(10**9, "productive").at(4 * 10**9)
    folder.log_books(ledger, 4.0)
    assert read_json_lines(folder.goodput_file)[0] == [
        {"time": 4.0, "goodput": 0.75, "seconds": {"initialisation": 1.0, "productive": 3.0}}
    ]


def test_the_timeline_is_replaced_as_a_whole(folder: RunFolder) -> None:
    folder.write_timeline("one\ntwo\n")
    folder.write_timeline("three\n")
    assert folder.timeline_file.read_text() == "three\n"


def test_a_record_is_read_in_pieces(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_timeline("0123456789")
    monkeypatch.setattr(run_folder, "PIECE", 4)
    assert folder.piece("timeline.jsonl", 0) == b"0123"
    assert folder.piece("timeline.jsonl", 8) == b"89"
    assert folder.piece("timeline.jsonl", 10) == b""
    assert folder.piece("timeline.jsonl", 11) is None
    assert folder.piece("events.jsonl", 0) is None
    assert json.loads(folder.facts_file.read_text()) == {"seed": 1}


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "ray.log", "controller.json", "checkpoints"])
def test_nothing_else_is_read(folder: RunFolder, name: str) -> None:
    with pytest.raises(ValueError, match="no part of a run's record"):
        folder.piece(name, 0)
