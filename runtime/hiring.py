"""How many workers there should be, and when to ask for further ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.plan import WorkerId
from runtime.signals import Hire

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 10.0
"""Seconds until another worker is asked for after one could not start; doubles each time."""


@dataclass
class Hiring:
    """``wanted`` workers are kept ready or on their way; ids are never used twice."""

    wanted: int
    next_worker: WorkerId
    starting: set[WorkerId] = field(default_factory=set)
    _pause: float = FIRST_PAUSE
    _not_before: float = 0.0

    def arrived(self, worker: WorkerId) -> None:
        self.starting.discard(worker)
        self._pause = FIRST_PAUSE

    def lost(self, worker: WorkerId, now: float) -> None:
        """Whoever was lost before it arrived could not start: the next try waits a little."""
        if worker in self.starting:
            self.starting.discard(worker)
            self._not_before = now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def unwanted(self, ready: int) -> list[WorkerId]:
        """Who is on the way and no longer needed where ``ready`` workers are there to stay, newest first.
        They are not waited for any more."""
        excess = max(ready + len(self.starting) - self.wanted, 0)
        found = sorted(self.starting, reverse=True)[:excess]
        self.starting.difference_update(found)
        return found

    def orders(self, ready: int, now: float) -> list[Hire]:
        """What to ask for where ``ready`` workers are there to stay."""
        if now < self._not_before:
            return []
        orders = []
        while ready + len(self.starting) < self.wanted:
            self.starting.add(self.next_worker)
            orders.append(Hire(self.next_worker))
            self.next_worker += 1
        return orders
