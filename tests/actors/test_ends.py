"""How a run's controller ends: whatever goes wrong on the way, to the end of it."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import ray_controller
from actors.ray_controller import ControllerActor
from actors.recorder import Recorder
from runtime.goodput import Ledger
from runtime.metrics import Metrics
from runtime.run_folder import RunFolder


def new_recorder(path: Path) -> Recorder:
    return Recorder(RunFolder.create(path / "run", "", {}), Metrics("run"), Ledger.begin(0))


@pytest.mark.parametrize("raising", ["feed", "workers", "metrics"])
def test_whoever_waits_for_the_end_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raising: str
) -> None:
    """Each of the ways that a run's things are seen off may fail; the others are gone all the same."""
    ended: list[str] = []

    def end(what: str, *_: object) -> None:
        ended.append(what)
        if what == raising:
            raise OSError(f"no {what}")

    def forming(first: int) -> None:
        raise ValueError("no such model")

    actor: Any = ControllerActor.__new__(ControllerActor)
    actor._recorder = new_recorder(tmp_path)
    actor._feed = SimpleNamespace(start=lambda: None, end=partial(end, "feed"))
    actor._exposition = SimpleNamespace(close=partial(end, "metrics"))
    actor._settings = SimpleNamespace(name="run")
    actor._is_anew, actor._error, actor._done = False, None, threading.Event()
    actor._form = forming
    monkeypatch.setattr(ray_controller, "end_all", partial(end, "workers"))
    with pytest.raises(OSError, match=f"no {raising}"):
        actor._live()
    assert ended == ["feed", "workers", "metrics"]
    with pytest.raises(ValueError, match="no such model"):
        actor.ended(0.0)
    assert actor._done.is_set() and actor._recorder.outcome == "failed"
