"""Ctrl-C and SIGTERM, sent to this very process."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from jobs.interruption import interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_one_asks_and_the_second_one_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    asked: list[bool] = []
    with pytest.raises(KeyboardInterrupt), interruptible(lambda: asked.append(True)):
        os.kill(os.getpid(), number)
        assert asked == [True]
        os.kill(os.getpid(), number)
    assert asked == [True] and signal.getsignal(number) is before


def test_in_another_thread_nothing_changes() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def run() -> None:
        with interruptible(lambda: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
