"""What a heartbeat tells of the call that a worker is in."""

from __future__ import annotations

import pytest

from runtime import pulse
from runtime.pulse import LONG_SECONDS, Pulse


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    return now


def test_seconds_of_the_present_call(clock: list[float]) -> None:
    heart = Pulse()
    assert heart.computing() == 0.0
    heart.enter()
    clock[0] += 2.0
    assert heart.computing() == 2.0
    heart.leave()
    assert heart.computing() == 0.0 and heart.progress == 1


def test_a_long_call_is_one_and_takes_its_time(clock: list[float]) -> None:
    heart = Pulse()
    with heart.long():
        clock[0] += LONG_SECONDS - 1
        assert 0.0 < heart.computing() < 0.01
        clock[0] += 6.0
        assert heart.computing() == 5.0
    assert heart.computing() == 0.0
    heart.enter()
    clock[0] += 2.0
    assert heart.computing() == 2.0
