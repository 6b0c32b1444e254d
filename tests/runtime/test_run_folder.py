from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from runtime.events import StepRecord, StepRepeated, WorkerLost
from runtime.run_folder import JsonLinesWriter, LoggedEvent, RunFolder, default_path, read_json_lines

STEP = StepRecord(0, 2.0, 1.0, 0.1, 8, 64, 0.2, 4, 0, 2**63 + 1)


def step(number: int, loss: float = 2.0) -> StepRecord:
    return replace(STEP, step=number, loss=loss)


def test_create_refuses_a_run_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run"
    folder = RunFolder.create(path, "steps = 8\n", {"seed": 3})
    assert folder.recipe.read_text() == "steps = 8\n" and folder.facts() == {"seed": 3}
    with pytest.raises(ValueError, match="already holds a run"):
        RunFolder.create(path, "steps = 9\n", {"seed": 4})
    assert folder.recipe.read_text() == "steps = 8\n" and folder.facts() == {"seed": 3}


def test_resume_takes_up_a_run_and_keeps_what_it_changes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run to resume"):
        RunFolder.create(tmp_path, "", {}, resume=True)
    with pytest.raises(ValueError, match="holds no run"):
        RunFolder(tmp_path).facts()
    RunFolder.create(tmp_path, "workers = 4\n", {"seed": 3})
    RunFolder.create(tmp_path, "workers = 4\n", {"torch": "1"}, resume=True)
    folder = RunFolder.create(tmp_path, "workers = 3\n", {"torch": "2"}, resume=True)
    assert folder.facts() == {"seed": 3, "resumes": [{"torch": "1"}, {"torch": "2"}]}
    assert folder.recipe.read_text() == "workers = 3\n"
    assert [path.name for path in sorted(tmp_path.glob("recipe-*"))] == ["recipe-2.toml"]
    assert (tmp_path / "recipe-2.toml").read_text() == "workers = 4\n"


def test_a_folder_with_other_files_can_hold_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder.create(tmp_path, "", {})
    assert folder.exists() and folder.ray_log.parent == folder.path
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_default_path_names_recipe_time_and_chance() -> None:
    now = datetime(2026, 3, 1, 14, 5, 9)
    paths = {default_path("my run/1", now=now) for _ in range(4)}
    assert len(paths) > 1
    for path in paths:
        assert path.parent == Path("runs")
        assert path.name[:-4] == "my-run-1-20260301-140509-" and int(path.name[-4:], 16) >= 0


@pytest.mark.parametrize("torn", [b'{"a": 3', b'{"a"', b"\xff", b'{"a": 3}'])
def test_a_torn_last_line_is_told_and_then_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "x.jsonl"
    whole = b'{"a": 1}\n{"a": 2}\n'
    path.write_bytes(whole + torn)
    records, problem = read_json_lines(path)
    assert records == [{"a": 1}, {"a": 2}]
    assert problem == f"{path}, line 3 is torn ({len(torn)} bytes) and was left out."
    writer = JsonLinesWriter(path)
    writer.append({"a": 4})
    writer.close()
    writer.close()
    assert path.read_bytes() == whole + b'{"a": 4}\n'
    assert read_json_lines(path) == ([{"a": 1}, {"a": 2}, {"a": 4}], None)


def test_a_file_that_is_only_a_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 3')
    JsonLinesWriter(path).close()
    assert path.read_bytes() == b"" and read_json_lines(path) == ([], None)
    assert read_json_lines(tmp_path / "none.jsonl") == ([], None)


def test_a_line_that_the_disk_had_no_room_for_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk takes the beginning of what it is given and refuses the rest."""
    path = tmp_path / "x.jsonl"
    writer, write = JsonLinesWriter(path), os.write
    writer.append({"a": 1})

    def full(descriptor: int, data: bytes) -> int:
        if len(data) < 5:
            raise OSError(errno.ENOSPC, "no space left on device")
        return write(descriptor, data[:5])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="no space left"):
            writer.append({"a": 2})
    writer.append({"a": 3})
    writer.close()
    assert path.read_bytes() == b'{"a": 1}\n{"a": 3}\n'


@pytest.mark.parametrize("size", [10, 1 << 16, (1 << 16) + 1, 200_000])
def test_a_torn_line_is_found_from_the_end(tmp_path: Path, size: int) -> None:
    whole = b'"' + b"y" * size + b'"\n"z"\n'
    for kept, torn in ((whole, b""), (whole, b"x" * size), (b"", b"x" * size), (whole[:-4], b"x")):
        path = tmp_path / "x.jsonl"
        path.write_bytes(kept + torn)
        JsonLinesWriter(path).close()
        assert path.read_bytes() == kept


def test_a_long_log_is_opened_without_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pread, taken = tmp_path / "x.jsonl", os.pread, []
    path.write_bytes(b'{"a": 1}\n' * 500_000)

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        taken.append(pread(descriptor, size, offset))
        return taken[-1]

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.delattr(Path, "read_bytes")
    JsonLinesWriter(path).close()
    assert 0 < sum(map(len, taken)) <= 1 << 17


@pytest.mark.parametrize("line", [b'{"a": 3', b"[1]", b""])
def test_a_bad_line_elsewhere_is_an_error_that_names_it(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2 is no JSON"):
        read_json_lines(path)


def test_what_is_appended_is_in_the_file_before_close(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "", {})
    folder.log_step(step(0))
    folder.log_event(StepRepeated(1, 2), time=12.5)
    other = RunFolder(tmp_path)
    assert other.read_steps().steps == (step(0),)
    assert other.read_events().events == (LoggedEvent(12.5, StepRepeated(1, 2)),)
    folder.close()


def test_events_and_steps_go_on_after_a_torn_end(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path, "", {})
    for number in range(3):
        first.log_step(step(number))
    first.log_event(WorkerLost(2, 1, "process died"), time=1.0)
    first.close()
    for path in (first.steps_file, first.events_file):
        path.write_bytes(path.read_bytes()[:-9])
    assert "line 3 is torn" in (first.read_steps().torn or "")
    assert first.read_events().events == () and "line 1 is torn" in (first.read_events().torn or "")
    second = RunFolder.create(tmp_path, "", {}, resume=True)
    second.log_step(step(2))
    second.log_event(WorkerLost(3, 0, "drained"), time=2.0)
    second.close()
    assert second.read_steps().steps == (step(0), step(1), step(2)) and second.read_steps().torn is None
    assert [logged.event for logged in second.read_events().events] == [WorkerLost(3, 0, "drained")]


def test_the_last_record_of_a_step_counts_and_superseded_ones_do_not(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "", {})
    for number in range(5):
        folder.log_step(step(number, loss=1.0))
    folder.log_step(step(4, loss=1.5))
    assert [record.loss for record in folder.read_steps().steps] == [1.0, 1.0, 1.0, 1.0, 1.5]
    folder.supersede_steps(2)
    assert [record.step for record in folder.read_steps().steps] == [0, 1]
    folder.log_step(step(2, loss=2.0))
    assert [record.loss for record in folder.read_steps().steps] == [1.0, 1.0, 2.0]
    folder.close()
    assert len(folder.steps_file.read_text().splitlines()) == 8


def test_a_line_that_is_no_event_or_step_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "", {})
    folder.events_file.write_text(json.dumps({"kind": "Unheard", "time": 1.0}) + "\n")
    with pytest.raises(ValueError, match=r"events\.jsonl, line 1 is no event: 'Unheard'"):
        folder.read_events()
    folder.steps_file.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"steps\.jsonl, line 1 is no step"):
        folder.read_steps()


READ = ((0, ((0, (3, 1)),)), (1, ((0, (2,)), (1, (0, 4)))))


def test_the_ledger_is_beside_the_steps_and_superseded_with_them(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "", {})
    assert folder.read_samples() == {}
    for number in (1, 2, 3):
        folder.log_step(replace(step(number), read=READ))
    folder.supersede_steps(2)
    folder.log_step(replace(step(2), read=READ[:1]))
    folder.close()
    assert RunFolder(tmp_path).read_samples() == {1: READ, 2: READ[:1]}
    assert all("read" not in json.loads(line) for line in folder.steps_file.read_text().splitlines())


def test_a_run_whose_data_tells_no_samples_has_no_ledger(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "", {})
    folder.log_step(step(1))
    folder.supersede_steps(1)
    folder.close()
    assert not folder.samples_file.exists() and folder.read_samples() == {}


def test_a_line_that_is_no_record_of_samples(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "", {})
    folder.samples_file.write_text('{"step": 1, "micro_batches": [[0, 7]]}\n')
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 1"):
        folder.read_samples()
