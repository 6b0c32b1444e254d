"""What the controller's driver does beside passing events on: manifests, and its own end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import host as module
from actors.host import Host, steady_time
from actors.recorder import Recorder
from runtime.events import CheckpointSkipped, CheckpointWritten, Event, StepRecord
from runtime.fabric.inprocess import InProcessFabric
from runtime.fabric.interface import CONTROL, EndpointClosed, Tag
from runtime.goodput import Ledger
from runtime.metrics import Metrics
from runtime.plan import CONTROLLER
from runtime.run_folder import RunFolder
from runtime.signals import WriteManifest


def new_host(path: Path) -> Host:
    fabric = InProcessFabric()

    def make(on_control: Any, on_lost: Any) -> Any:
        return fabric.endpoint(CONTROLLER, on_control=on_control, on_lost=on_lost)

    folder = RunFolder.create(path / "run", "", {})
    recorder = Recorder(folder, Metrics("run"), Ledger.begin(round(steady_time() * 1e9)))
    return Host(make, recorder, checkpoint_root=str(path / "checkpoints"), keep=1, recipe="")


class Ill:
    """A controller whose first decision fails."""

    terms = SimpleNamespace(layout=None)

    def handle(self, event: object, now: float) -> list[Any]:
        raise AssertionError("a mistake")


def test_a_host_that_met_an_error_leaves_nothing_open(tmp_path: Path) -> None:
    host, ill = new_host(tmp_path), Ill()
    with pytest.raises(AssertionError, match="a mistake"):
        host.run(ill)  # type: ignore[arg-type]
    assert not host._timeline._thread.is_alive()
    with pytest.raises(RuntimeError, match="after shutdown"):
        host._writer.submit(print)
    with pytest.raises(EndpointClosed):
        host.endpoint.send(0, Tag(0, 0, 0, CONTROL))


def written(host: Host, version: int, monkeypatch: pytest.MonkeyPatch) -> Event:
    """The event of a checkpoint's end; it must be on record before the controller, whose run may end with
    that, hears of it."""
    told: list[bool] = []
    event = host.recorder.event

    def noted(what: Event, now: float) -> None:
        told.append(host._events.empty())
        event(what, now)

    monkeypatch.setattr(host.recorder, "event", noted)
    host._layout = None  # type: ignore[assignment]
    host._write_manifest(WriteManifest(version, None, ()))
    assert told == [True] and not host._events.empty()
    return host.recorder.events[-1]


def test_a_checkpoint_takes_from_its_steps_commit_to_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = new_host(tmp_path)
    monkeypatch.setattr(module, "write_manifest", lambda *_, **__: SimpleNamespace(bytes=7))
    now = steady_time()
    for step in (7, 8, 9):
        record = StepRecord(step, 1.0, 1.0, 0.1, 4, 4, 1.0, 3, 1, 0, committed_at=now - 10.0 * (10 - step))
        host.recorder.step(record, now)
    event = written(host, 8, monkeypatch)
    assert isinstance(event, CheckpointWritten) and (event.version, event.bytes) == (8, 7)
    assert 20.0 <= event.seconds < 25.0


def test_a_checkpoint_of_a_step_that_is_not_on_record_takes_what_the_manifest_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "write_manifest", lambda *_, **__: SimpleNamespace(bytes=7))
    event = written(new_host(tmp_path), 0, monkeypatch)
    assert isinstance(event, CheckpointWritten) and 0.0 <= event.seconds < 5.0


def test_a_manifest_that_could_not_be_written_is_on_record_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(module, "write_manifest", refused)
    event = written(new_host(tmp_path), 8, monkeypatch)
    assert event == CheckpointSkipped("the checkpoint of step 8 was not finished: read-only")
