"""The account of one recovery: from the first loss until everybody is under way again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.events import Recovered, RecoverySeconds, StateSource
from runtime.plan import WorkerId


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
    _kept: float = 0.0
    _waiting: set[WorkerId] = field(default_factory=set)
    _workers_after: int = 0
    _version: int = 0
    _source: StateSource = "peers"
    _bytes: int = 0

    def lose(self, worker: WorkerId, reason: str, now: float, died_at: float | None) -> None:
        """A loss found at ``now``; ``died_at`` is known of faults that announce themselves, and without
        it detection counts from its first evidence: zero."""
        if not self.lost and died_at is not None:
            self._detect = max(0.0, now - died_at)
        self.lost.append(worker)
        self.reasons.append(reason)
        self._interrupted_at = now

    def explain(self, worker: WorkerId, reason: str) -> None:
        """It has become known why ``worker`` was lost."""
        if worker in self.lost:
            self.reasons[self.lost.index(worker)] = reason

    def agreed(self, now: float) -> None:
        """All survivors have reported, and there are enough of them to go on."""
        self._agreed_at = now

    def planned(
        self,
        members: Iterable[WorkerId],
        version: int,
        source: StateSource,
        lost_work: float,
        kept: float = 0.0,
    ) -> None:
        """Work goes on from ``version``, which was reached ``lost_work`` seconds ago; a part ``kept`` of what
        the step takes is done. Where something is kept, the lost workers' part of those seconds has to be
        done again: as much as their part of the workers. Once an incident has gone back behind what its peers
        held, that is what it tells, though a further loss is recovered from by peers that read it."""
        redo = lost_work - self._detect
        if kept:
            redo *= len(self.lost) / self.workers_before
        self._redo = max(self._redo, redo)
        self._kept = kept
        self._waiting = set(members)
        self._workers_after = len(self._waiting)
        if source != "peers" or self._source == "peers":
            self._version, self._source = version, source

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
            kept=self._kept,
            seconds=RecoverySeconds(
                detect=self._detect,
                agree=max(0.0, self._agreed_at - self.began),
                plan=max(0.0, self._sent_at - self._agreed_at),
                move=max(0.0, self._moved_at - self._sent_at),
                redo=self._redo,
            ),
        )
