"""Asked of the kernel itself: what a thread's turn is, it tells by sched_getattr(2)."""

from __future__ import annotations

import ctypes
import os
import platform
import threading

import pytest

from runtime import time_slices
from runtime.time_slices import SLICE_SECONDS, ask_for_slices, long_slices

_GET = {"x86_64": 315, "aarch64": 275}


def turn_seconds() -> float:
    """Of the calling thread."""
    found = time_slices._Attributes()
    size = ctypes.sizeof(found)
    call = ctypes.CDLL(None).syscall
    assert call(_GET[platform.machine()], 0, ctypes.byref(found), size, 0) == 0
    return float(found.runtime / 1e9)


@pytest.fixture
def usual() -> float:
    """What a thread gets that asks for nothing."""
    if not ask_for_slices(SLICE_SECONDS):
        pytest.skip("the system does not let a thread ask")
    heeded = turn_seconds() == SLICE_SECONDS
    ask_for_slices(0.0)
    if not heeded:
        pytest.skip("Linux before 6.12 understands, and changes nothing")
    return turn_seconds()


def test_a_thread_has_long_turns_while_it_computes(usual: float) -> None:
    assert usual < SLICE_SECONDS
    with long_slices():
        assert turn_seconds() == SLICE_SECONDS
    assert turn_seconds() == usual


def test_an_interrupted_one_has_its_usual_turns_again(usual: float) -> None:
    with pytest.raises(RuntimeError), long_slices():
        raise RuntimeError
    assert turn_seconds() == usual


def test_other_threads_keep_theirs(usual: float) -> None:
    asked, theirs = threading.Event(), []

    def other() -> None:
        asked.wait()
        theirs.append(turn_seconds())

    thread = threading.Thread(target=other)
    thread.start()
    with long_slices():
        asked.set()
        thread.join()
    assert theirs == [usual]


def test_niceness_stays(usual: float) -> None:
    def nicer() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 7)
        with long_slices():
            found.append(os.getpriority(os.PRIO_PROCESS, 0))
        found.append(os.getpriority(os.PRIO_PROCESS, 0))

    found: list[int] = []
    thread = threading.Thread(target=nicer)
    thread.start()
    thread.join()
    assert found == [7, 7]


def test_a_system_that_cannot_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_slices, "_call", None)
    with long_slices():
        assert not ask_for_slices(SLICE_SECONDS)


def test_a_refusal_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_slices, "_call", lambda *_: -1)
    with long_slices():
        assert not ask_for_slices(SLICE_SECONDS)
