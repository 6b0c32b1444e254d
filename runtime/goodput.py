"""The goodput ledger: where a run's wall time goes.

Split as in ml-goodput-measurement (AI-Hypercomputer): productive training on one side, badput by
cause on the other. Time is kept in integer nanoseconds, so the parts sum to the wall time exactly.
The ledger is an immutable value and reads no clock: whoever owns one says what time it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, get_args

Cause = Literal[
    "productive",
    "initialisation",
    "data_wait",
    "checkpoint",
    "wasted_progress",
    "recovery_detect",
    "recovery_agree",
    "recovery_plan",
    "recovery_move",
    "recovery_redo",
    "join",
    "paused",
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
BADPUT: tuple[Cause, ...] = tuple(cause for cause in CAUSES if cause != "productive")


@dataclass(frozen=True)
class Ledger:
    """Nanoseconds by cause, from ``started`` to ``now`` on a monotonic clock.

    The time after ``now`` will be booked under ``cause``. ``uncommitted`` is the part of the
    productive time that the last committed step does not cover: a loss can turn it to waste.
    """

    started: int
    now: int
    cause: Cause
    nanoseconds: MappingProxyType[Cause, int]
    uncommitted: int = 0

    @classmethod
    def begin(cls, now: int, cause: Cause = "initialisation") -> Ledger:
        return cls(now, now, cause, MappingProxyType(dict.fromkeys(CAUSES, 0)))

    def at(self, now: int) -> Ledger:
        """The books closed at ``now``; the current cause goes on."""
        assert now >= self.now, f"the clock ran back from {self.now} to {now}"
        passed = now - self.now
        return replace(
            self,
            now=now,
            nanoseconds=MappingProxyType(
                {**self.nanoseconds, self.cause: self.nanoseconds[self.cause] + passed}
            ),
            uncommitted=self.uncommitted + (passed if self.cause == "productive" else 0),
        )

    def enter(self, now: int, cause: Cause) -> Ledger:
        """From ``now`` on, time is booked under ``cause``."""
        return replace(self.at(now), cause=cause)

    def commit(self, now: int) -> Ledger:
        """A step was committed: the productive time until ``now`` is safe."""
        return replace(self.at(now), uncommitted=0)

    def waste(self, now: int) -> Ledger:
        """The step under way was lost: its productive time becomes wasted progress."""
        ledger = self.at(now)
        return ledger.move("productive", "wasted_progress", ledger.uncommitted)

    def move(self, source: Cause, target: Cause, nanoseconds: int) -> Ledger:
        """Books time under another cause afterwards: a loss noticed late, committed steps that
        only an older checkpoint remembers, the wait for data inside a step. Takes what ``source`` has,
        at most.
        """
        assert nanoseconds >= 0, nanoseconds
        books = dict(self.nanoseconds)
        taken = min(nanoseconds, books[source])
        books[source] -= taken
        books[target] += taken
        uncommitted = self.uncommitted
        if source == "productive" != target:
            uncommitted = max(0, uncommitted - taken)
        return replace(self, nanoseconds=MappingProxyType(books), uncommitted=uncommitted)

    @property
    def total(self) -> int:
        """Wall time, nanoseconds. Equals the sum over all causes."""
        return self.now - self.started

    @property
    def committed(self) -> int:
        """Productive nanoseconds up to the last committed step."""
        return self.nanoseconds["productive"] - self.uncommitted

    @property
    def goodput(self) -> float:
        """Productive share of the wall time, 0 to 1."""
        return self.nanoseconds["productive"] / self.total if self.total else 0.0
