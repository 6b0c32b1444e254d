"""Who has fallen silent, who is stuck, and whom to believe when workers accuse each other. Pure.

A dead process shows by its sockets. What is found here is worse: a process that is stopped, a call
that never returns, a machine or a link that swallows packets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from runtime.plan import WorkerId

FEW_BEATS = 5
"""So many heartbeats' time without a look at the clock means that this process itself stood still."""

GAPS = 64
"""Gaps between a worker's heartbeats that patience is computed from."""

LONGEST_GAPS = 4.0
"""Patience is at least this many times the longest gap that any worker's heartbeats had lately: on a busy
machine heartbeats come late, and giving up the living costs more than waiting a little for the dead."""

MOST = 10.0
"""Patience never grows beyond this many times ``silence_seconds``."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what. Seconds, unless they say otherwise.

    Workers tell of themselves every ``beat_seconds``; one that has not for ``silence_seconds`` (longer where
    heartbeats have been irregular) is given up. So is one that has been inside one layer or one read of data
    for ``stuck_steps`` times the median step and at least ``stuck_seconds``. Peers that accuse each other
    while both are alive are heard for ``dispute_seconds``, and until each has sent another heartbeat, before
    one of them has to go.
    """

    beat_seconds: float = 0.2
    silence_seconds: float = 1.0
    stuck_seconds: float = 5.0
    stuck_steps: float = 5.0
    dispute_seconds: float = 0.2


@dataclass
class _Pulse:
    heard: float
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=GAPS))
    progress: int = -1
    computing: float = 0.0
    computed: float = 0.0
    """When it last said that it was computing."""
    longest: float = 0.0

    def came(self, now: float) -> None:
        gap = max(0.0, now - self.heard)
        leaves = self.gaps[0] if len(self.gaps) == GAPS else 0.0
        self.gaps.append(gap)
        # looked for among all only when the longest has left: thousands of workers are watched
        self.longest = max(self.gaps) if leaves >= self.longest else max(self.longest, gap)
        self.heard = now


class Watch:
    """Heartbeats of the members. The clock is the controller's."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._pulses: dict[WorkerId, _Pulse] = {}
        self._ticked: float | None = None
        self._moved: float | None = None

    def begin(self, worker: WorkerId, now: float) -> None:
        """``worker`` is ready. Its first heartbeat may take a while; it is as bad if it never comes."""
        self._pulses.setdefault(worker, _Pulse(now + MOST * self._patience.silence_seconds))

    def beat(self, worker: WorkerId, progress: int, computing: float, now: float) -> None:
        """A heartbeat came."""
        pulse = self._pulses.get(worker)
        if pulse is None:
            pulse = self._pulses[worker] = _Pulse(now)
        else:
            pulse.came(now)
        if computing > 0.0:
            pulse.computed = now
        if progress != pulse.progress or computing > 0.0:
            self._moved = now
        pulse.progress, pulse.computing = progress, computing

    def forget(self, worker: WorkerId) -> None:
        self._pulses.pop(worker, None)

    def heard_since(self, worker: WorkerId, moment: float) -> bool:
        """Whether a heartbeat has come after that; also of whoever sends none."""
        pulse = self._pulses.get(worker)
        return pulse is None or pulse.heard > moment

    def late(self, owing: Collection[WorkerId], asked: float, now: float) -> list[WorkerId]:
        """Of those who owe an answer to what they were ``asked`` then, who should have given it by now,
        ascending. A call that depends on nobody else, of which its heartbeats tell, comes before."""
        free = {worker: asked for worker in owing}
        free |= {worker: max(asked, self._pulses[worker].computed) for worker in free.keys() & self._pulses}
        return sorted(w for w, since in free.items() if now - since > self._patience.stuck_seconds)

    def tick(self, now: float) -> None:
        """Must be called every ``beat_seconds`` or so. Where it was not, this process itself stood still, and
        that is nobody else's fault: the lost time counts for nobody."""
        if self._ticked is not None:
            slept = now - self._ticked - FEW_BEATS * self._patience.beat_seconds
            if slept > 0:
                for pulse in self._pulses.values():
                    pulse.heard += slept
        self._ticked = now

    def patience(self) -> float:
        """Seconds of silence after which a worker is given up."""
        least = self._patience.silence_seconds
        longest = max((pulse.longest for pulse in self._pulses.values()), default=0.0)
        return min(max(least, LONGEST_GAPS * longest), MOST * least)

    def overdue(self, now: float, step_seconds: float) -> list[tuple[WorkerId, str]]:
        """(worker, reason) of everybody to be given up now, ascending. ``step_seconds`` is the median step,
        0.0 where none is known."""
        stuck_after = max(self._patience.stuck_seconds, self._patience.stuck_steps * step_seconds)
        patience = self.patience()
        silent_ones = sum(now - pulse.heard > patience for pulse in self._pulses.values())
        if len(self._pulses) > 2 and silent_ones > len(self._pulses) // 2:
            # most of them at once: rather this machine or its network than all of theirs
            patience = MOST * self._patience.silence_seconds
        found = []
        for worker, pulse in sorted(self._pulses.items()):
            silent = now - pulse.heard
            if silent > patience:
                found.append((worker, f"no sign of life for {silent:.1f} s"))
            elif pulse.computing > stuck_after:
                found.append((worker, f"stuck in one call for {pulse.computing:.1f} s"))
        return found

    def stalled(self, now: float, step_seconds: float) -> bool:
        """Whether nobody has done anything for longer than anything takes: everybody waits for
        something that is lost."""
        if self._moved is None or not self._pulses:
            return False
        return now - self._moved > max(2 * self._patience.silence_seconds, 2 * step_seconds)

    def stirred(self, now: float) -> None:
        """Counts as movement: whatever was done about a stall gets its time to show."""
        self._moved = now


Link = tuple[WorkerId, WorkerId]
"""Two workers that cannot reach each other, the lower id first."""


def link(one: WorkerId, other: WorkerId) -> Link:
    return (one, other) if one < other else (other, one)


def to_fence(broken: Collection[Link], members: Collection[WorkerId]) -> list[WorkerId]:
    """The members to give up so that no broken link is left between two that stay; few of them.

    Greedy vertex cover: the one with the most broken links first, then the highest id. A worker that is
    cut off from all others is found after one look, whoever complained first.
    """
    left = {pair for pair in broken if pair[0] in members and pair[1] in members}
    fenced: list[WorkerId] = []
    while left:
        counts: dict[WorkerId, int] = {}
        for worker in (worker for pair in left for worker in pair):
            counts[worker] = counts.get(worker, 0) + 1
        worst = max(counts, key=lambda worker: (counts[worker], worker))
        fenced.append(worst)
        left = {pair for pair in left if worst not in pair}
    return fenced


@dataclass
class Disputes:
    """Links that somebody says are broken while both ends are alive."""

    patience: Patience
    _since: dict[Link, float] = field(default_factory=dict)

    def accuse(self, worker: WorkerId, peer: WorkerId, now: float) -> None:
        self._since.setdefault(link(worker, peer), now)

    def forget(self, worker: WorkerId) -> None:
        self._since = {pair: since for pair, since in self._since.items() if worker not in pair}

    def clear(self) -> None:
        self._since.clear()

    def due(
        self, now: float, members: Iterable[WorkerId], heard_since: Callable[[WorkerId, float], bool]
    ) -> list[WorkerId]:
        """Whom to give up, once the oldest complaint has been open for ``dispute_seconds``.

        Nobody, as long as one of those who are concerned has not been heard of after the newest complaint: it
        may be gone, and the news of that on its way, or its silence about to show. Then nobody else is."""
        if not self._since or now - min(self._since.values()) < self.patience.dispute_seconds:
            return []
        staying = set(members)
        broken = [pair for pair in self._since if staying.issuperset(pair)]
        newest = max(self._since.values())
        if not all(heard_since(worker, newest) for pair in broken for worker in pair):
            return []
        self._since.clear()
        return to_fence(broken, staying)
