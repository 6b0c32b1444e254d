"""A run that is put through one fault after the other: until it is calm, until it goes on, and what hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from jobs.bench.kills import Commit, Recovery, recovery

CALM_STEPS = 20
START_SECONDS, PATIENCE_SECONDS = 120.0, 60.0
POLL_SECONDS = 0.1


class Watched:
    """A run that meets one fault after the other. ``check`` raises RuntimeError if the run has ended."""

    def __init__(self, commits: Callable[[], Sequence[Commit]], check: Callable[[], None]) -> None:
        self.commits, self._check = commits, check

    def is_calm(self) -> bool:
        """Whether the newest membership has committed enough steps."""
        commits = self.commits()
        return sum(commit.losses == commits[-1].losses for commit in commits) >= CALM_STEPS

    def calm(self) -> None:
        """Until ``is_calm``. Raises TimeoutError."""
        self.wait("the workers did not train", self.is_calm, START_SECONDS)

    def recovery(self, at: float) -> Recovery | None:
        """None if nobody went on."""

        def went_on() -> bool:
            return recovery(self.commits(), at) is not None

        with suppress(TimeoutError):
            self.wait("nobody went on", went_on, PATIENCE_SECONDS)
        return recovery(self.commits(), at)

    def wait(self, problem: str, until: Callable[[], bool], patience: float) -> None:
        """Raises TimeoutError after ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while not until():
            self._check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{problem} within {patience:.0f} s")
            time.sleep(POLL_SECONDS)


@contextmanager
def stopped(process: int) -> Iterator[float]:
    """A process that hangs from the moment on that is handed out (in seconds since 1970) and is killed at
    the end, if it was not by others: it must not stay behind.
    """
    known = os.pidfd_open(process)  # so that nobody else is hit if the number is given out anew
    try:
        at = time.time()
        os.kill(process, signal.SIGSTOP)
        try:
            yield at
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(known, signal.SIGKILL)
    finally:
        os.close(known)
