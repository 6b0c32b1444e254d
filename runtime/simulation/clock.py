"""Simulated time: a queue of things to do, each at its moment."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Clock:
    """Runs actions in order of their moments; equal moments in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done = 0
        self._queue: list[tuple[float, int, Action]] = []
        self._asked = 0

    def at(self, moment: float, action: Action) -> None:
        """Runs ``action`` at ``moment`` (seconds), or as soon as possible where that lies behind."""
        self._asked += 1
        heapq.heappush(self._queue, (max(moment, self.now), self._asked, action))

    def after(self, seconds: float, action: Action) -> None:
        self.at(self.now + seconds, action)

    def step(self) -> bool:
        """Runs the next action; False where there is none."""
        if not self._queue:
            return False
        self.now, _, action = heapq.heappop(self._queue)
        self.done += 1
        action()
        return True
