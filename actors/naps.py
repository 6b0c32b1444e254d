"""Lets an actor's main thread sleep while another thread of it computes.

Ray's main loop looks for signals a hundred times a second, and each look wants the interpreter's lock:
that took 1.2% of the processor time of a worker that computes. A signal handler that sleeps, run by such a
look, puts the next ones off. Each heartbeat starts a nap. Calls of the actor wait for the end of one at most;
other signals are handled as they come.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

SHARE = 0.9
"""Of the seconds between two heartbeats: one that comes in the middle of a nap would start no other."""


class Naps:
    """Made in the main thread, the only one that may set signal handlers. ``again``: from any other."""

    def __init__(self, beat_seconds: float) -> None:
        self._seconds = SHARE * beat_seconds
        self._asleep = False
        self._signal = getattr(signal, "SIGRTMIN", None)  # not on every system: no naps there
        if self._signal is not None:
            signal.signal(self._signal, self._sleep)

    def _sleep(self, number: int, frame: FrameType | None) -> None:
        if self._asleep:  # a signal that comes meanwhile is handled inside the sleep
            return
        self._asleep = True
        try:
            time.sleep(self._seconds)
        finally:
            self._asleep = False

    def again(self) -> None:
        """Another nap, from the main loop's next look on."""
        main = threading.main_thread().ident
        if self._signal is not None and main is not None and not self._asleep:
            signal.pthread_kill(main, self._signal)
