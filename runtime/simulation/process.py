"""A simulated process: its threads run at simulated moments, stand still while it is stopped, and die."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from functools import partial
from random import Random
from typing import TypeVar

from runtime.simulation.clock import Action, Clock

T = TypeVar("T")

Waits = Generator[float | None, None, T]
"""What a simulated thread does: it yields seconds that it computes for, or None where it waits until it is
woken, and returns a T."""

WAKING_SECONDS = 0.0005
"""Up to how long a thread that was woken takes until it runs."""


class ProcessEnded(Exception):
    """Raised inside a process that has just been killed."""


class Process:
    """One main thread (a generator) and any number of short actions of other threads."""

    def __init__(self, clock: Clock, random: Random) -> None:
        self.clock, self.random = clock, random
        self.alive = True
        self.stopped = False
        self.on_end: Action = lambda: None
        self._late: deque[Action] = deque()
        self._main: Waits[object] | None = None
        self._waiting = False

    def start(self, main: Waits[object]) -> None:
        self._main = main
        self.after(0.0, self._advance)

    def do(self, action: Action) -> None:
        """Runs ``action`` now, later where the process is stopped, never where it has ended."""
        if self.stopped:
            self._late.append(action)
        elif self.alive:
            action()

    def after(self, seconds: float, action: Action) -> None:
        self.clock.after(seconds, partial(self.do, action))

    def wake(self) -> None:
        """The main thread may have something to do."""
        if self._waiting:
            self._waiting = False
            self.after(self.random.uniform(0.0, WAKING_SECONDS), self._advance)

    def _advance(self) -> None:
        assert self._main is not None
        try:
            seconds = next(self._main)
        except (StopIteration, ProcessEnded):
            self.end()
            return
        if seconds is None:
            self._waiting = True
        else:
            self.after(seconds, self._advance)

    def stop(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after ``seconds``."""
        if not self.alive:
            return
        self.stopped = True
        self.clock.after(seconds, self._go_on)

    def _go_on(self) -> None:
        self.stopped = False
        while self._late and not self.stopped:
            self.do(self._late.popleft())

    def end(self) -> None:
        """The process is gone, in the middle of whatever it does."""
        if not self.alive:
            return
        self.alive = False
        self.stopped = False
        self._late.clear()
        self.on_end()
