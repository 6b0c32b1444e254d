"""What a controller that is started anew takes from the record of the one before."""

from __future__ import annotations

from pathlib import Path

from actors.recorder import Recorder
from runtime.events import RunFinished, RunStarted
from runtime.goodput import Ledger
from runtime.metrics import Metrics
from runtime.run_folder import RunFolder

STARTED = RunStarted("run", steps=9, workers=2, stages=1, from_version=0, source="initial")


def new_run(path: Path) -> tuple[RunFolder, Recorder]:
    folder = RunFolder.create(path / "run", "", {})
    return folder, Recorder(folder, Metrics("run"), Ledger.begin(0))


def test_an_ended_run_stays_ended(tmp_path: Path) -> None:
    folder, recorder = new_run(tmp_path)
    recorder.event(STARTED, 1.0)
    assert Recorder.replay(folder, Metrics("run"), 2.0).outcome is None
    recorder.finish("failed", "worker 1: no such file", 3.0)
    again = Recorder.replay(folder, Metrics("run"), 4.0)
    assert (again.outcome, again.message) == ("failed", "worker 1: no such file")


def test_a_resumed_run_has_not_ended_because_its_first_start_has(tmp_path: Path) -> None:
    folder, recorder = new_run(tmp_path)
    recorder.event(STARTED, 1.0)
    recorder.finish("interrupted", "stopped by hand", 3.0)
    resumed = Recorder.replay(folder, Metrics("run"), 6.0, since=5.0)
    assert resumed.outcome is None
    assert not any(isinstance(event, RunStarted | RunFinished) for event in resumed.events)
