"""Signals are real; only how long a nap lasts is not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from actors import naps
from actors.naps import SHARE, Naps

BEAT_SECONDS = 0.2


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds of every nap."""
    found: list[float] = []
    monkeypatch.setattr(naps, "time", SimpleNamespace(sleep=found.append))
    number = signal.SIGRTMIN
    before = signal.getsignal(number)
    yield found
    signal.signal(number, before)


def in_another_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_every_heartbeat_starts_a_nap_of_the_main_thread_that_ends_before_the_next(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[threading.Thread] = []

    def nap(seconds: float) -> None:
        slept.append(seconds)
        where.append(threading.current_thread())

    monkeypatch.setattr(naps, "time", SimpleNamespace(sleep=nap))
    napping = Naps(BEAT_SECONDS)
    for beats in (1, 2, 3):
        in_another_thread(napping.again)
        assert slept == [SHARE * BEAT_SECONDS] * beats
    assert set(where) == {threading.main_thread()}
    assert SHARE < 1


def test_a_heartbeat_in_the_middle_of_a_nap_starts_no_other(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    napping = Naps(BEAT_SECONDS)

    def nap(seconds: float) -> None:
        slept.append(seconds)
        in_another_thread(napping.again)

    monkeypatch.setattr(naps, "time", SimpleNamespace(sleep=nap))
    in_another_thread(napping.again)
    assert len(slept) == 1


def test_without_such_a_signal_there_are_no_naps(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGRTMIN")
    Naps(BEAT_SECONDS).again()
    assert slept == []
