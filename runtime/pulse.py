"""What a worker is doing right now, for its heartbeats: written by its main thread, read by another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

LONG_SECONDS = 600.0
"""What a call may take that is known to take long."""

_SOME = 1e-3


class Pulse:
    """Counts what is done, and remembers since when the present call has lasted."""

    def __init__(self) -> None:
        self.progress = 0
        self._since = 0.0
        self._allowed = 0.0

    def enter(self) -> None:
        """A call begins that depends on nobody else: a layer, a read of data, an update."""
        self.progress += 1
        self._since = time.monotonic()

    @contextmanager
    def long(self) -> Iterator[None]:
        """Such a call, but as long as a whole model takes to be built, or a foreign engine around it:
        meanwhile this worker can be asked nothing, and only after ``LONG_SECONDS`` it counts as stuck."""
        self._allowed = LONG_SECONDS
        self.enter()
        try:
            yield
        finally:
            self.leave()
            self._allowed = 0.0

    def leave(self) -> None:
        self._since = 0.0

    def computing(self) -> float:
        """Seconds since the present call began, beyond what it may take, but always more than 0.0; that is
        what it is between calls, and while waiting for others."""
        since = self._since
        return max(time.monotonic() - since - self._allowed, _SOME) if since else 0.0
