"""A thread that shares its core with another process is told how long it stood without it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime import contention
from runtime.contention import SCHEDULED, seconds_without_core


@pytest.mark.skipif(not SCHEDULED.exists(), reason="this system keeps no scheduler statistics")
def test_time_without_a_core_is_told_apart_from_time_on_it() -> None:
    cores = os.sched_getaffinity(0)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(busy.pid, {min(cores)})
        os.sched_setaffinity(0, {min(cores)})
        began, without, on = time.perf_counter(), seconds_without_core(), time.thread_time()
        while seconds_without_core() - without < 0.05:
            assert time.perf_counter() - began < 60, "two processes had the same core to themselves"
        passed = time.perf_counter() - began
        assert time.thread_time() - on + seconds_without_core() - without <= passed + 0.01
    finally:
        os.sched_setaffinity(0, cores)
        busy.kill()
        busy.wait()


@pytest.mark.parametrize("text", [None, "", "12", "12 many 3"])
def test_nothing_is_known_where_the_system_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "schedstat").write_text(text)
    monkeypatch.setattr(contention, "SCHEDULED", tmp_path / "schedstat")
    assert seconds_without_core() == 0.0
