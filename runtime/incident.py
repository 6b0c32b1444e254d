"""The account of one recovery: from the first loss until everybody is under way again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.events import Recovered, RecoverySeconds
from runtime.plan import WorkerId
from runtime.protocol import StateSource


@dataclass
class Incident:
    """Times are the controller's. A further loss on the way belongs to the same incident."""

    step: int
    workers_before: int
    began: float
    lost: list[WorkerId] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    over: bool = False
    _detect: float = 0.0
    _interrupted_at: float = 0.0
    _agreed_at: float = 0.0
    _sent_at: float = 0.0
    _moved_at: float = 0.0
    _redo: float = 0.0
    _waiting: set[WorkerId] = field(default_factory=set)
    _workers_after: int = 0
    _version: int = 0
    _source: StateSource = "peers"
    _bytes: int = 0

    def lose(self, worker: WorkerId, reason: str, now: float, last_seen: float) -> None:
        """A loss found at ``now``; ``last_seen`` is the worker's last sign of life."""
        if not self.lost:
            self._detect = max(0.0, now - last_seen)
        self.lost.append(worker)
        self.reasons.append(reason)
        self._interrupted_at = now

    def agreed(self, now: float, step_elapsed: float) -> None:
        """All survivors have reported; the step they left was ``step_elapsed`` seconds old."""
        self._agreed_at = now
        self._redo = max(self._redo, step_elapsed)

    def planned(self, members: Iterable[WorkerId], version: int, source: StateSource) -> None:
        self._waiting = set(members)
        self._workers_after = len(self._waiting)
        self._version = version
        self._source = source

    def sent(self, now: float) -> None:
        if not self._sent_at or self._sent_at < self._agreed_at:
            self._sent_at = now

    def moved(self, worker: WorkerId, bytes_received: int, now: float) -> None:
        self._waiting.discard(worker)
        self._bytes += bytes_received
        self._moved_at = now
        self.over = not self._waiting

    def recovered(self) -> Recovered:
        """The finished account. ``redo`` is the work of the interrupted step, done again."""
        return Recovered(
            step=self.step,
            lost=tuple(self.lost),
            reason=self.reasons[0],
            workers_before=self.workers_before,
            workers_after=self._workers_after,
            source=self._source,
            from_version=self._version,
            moved_bytes=self._bytes,
            seconds=RecoverySeconds(
                detect=self._detect,
                agree=max(0.0, self._agreed_at - self.began),
                plan=max(0.0, self._sent_at - self._agreed_at),
                move=max(0.0, self._moved_at - self._sent_at),
                redo=self._redo,
            ),
        )
