"""What a worker is doing right now, for its heartbeats: written by its main thread, read by another."""

from __future__ import annotations

import time


class Pulse:
    """Counts what is done, and remembers since when the present call has lasted."""

    def __init__(self) -> None:
        self.progress = 0
        self._since = 0.0

    def enter(self) -> None:
        """A call begins that depends on nobody else: a layer, a read of data, an update."""
        self.progress += 1
        self._since = time.monotonic()

    def leave(self) -> None:
        self._since = 0.0

    def computing(self) -> float:
        """Seconds since the present call began; 0.0 between calls, and while waiting for others."""
        since = self._since
        return time.monotonic() - since if since else 0.0
