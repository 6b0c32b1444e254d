"""Ctrl-C and SIGTERM: the first one asks for an orderly end, the second one ends the process at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def interruptible(ask: Callable[[], None]) -> Iterator[None]:
    """Calls ``ask`` at the first Ctrl-C or SIGTERM; a second one raises KeyboardInterrupt where the process
    is. Outside the main thread, which alone hears signals, it changes nothing."""
    asked = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        ask()

    previous = {}
    with suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
