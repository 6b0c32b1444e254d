"""A simulated network: what may happen to messages between live and dead processes that speak TCP.

Each ordered pair of ends has a link of three lanes, as the sockets have. A lane keeps its order and loses
nothing; different lanes and links overtake each other. A cut holds everything back in one direction until
it heals. A link that ends stays ended, as between real endpoints.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Protocol

from runtime.fabric.interface import Message
from runtime.plan import WorkerId
from runtime.simulation.clock import Action, Clock

KEEP_ALIVE_SECONDS = 10.0
"""How long a link may be silent, because the other machine is gone or cut off, before TCP gives it up."""

MAIN, BACKGROUND, CONTROL_LANE = range(3)


@dataclass(frozen=True)
class Latency:
    """Seconds: most messages take ``least`` to ``most``, one in ``rare`` up to ``worst``."""

    least: float = 0.0001
    most: float = 0.002
    worst: float = 0.08
    rare: int = 30

    def draw(self, random: Random) -> float:
        if random.random() * self.rare < 1:
            return random.uniform(self.most, self.worst)
        return random.uniform(self.least, self.most)


class End(Protocol):
    """What the network does to an endpoint."""

    def arrived(self, message: Message) -> None: ...

    def ended(self, peer: WorkerId, reason: str) -> None: ...


@dataclass
class _Link:
    arrivals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    held: deque[Action] = field(default_factory=deque)
    hung_up: bool = False
    epoch: int = 0


class Network:
    """Carries messages between the ``ends``, which processes add when they start."""

    def __init__(self, clock: Clock, random: Random, latency: Latency | None = None) -> None:
        self.ends: dict[WorkerId, End] = {}
        self.refusing: set[WorkerId] = set()
        """Ends whose process is dead while its machine lives: it refuses connections."""
        self.silent: set[WorkerId] = set()
        """Ends whose machine is gone: nothing answers."""
        self._clock, self._random = clock, random
        self._latency = latency or Latency()
        self._links: dict[tuple[WorkerId, WorkerId], _Link] = {}
        self._cuts: Counter[tuple[WorkerId, WorkerId]] = Counter()

    def peers(self, end: WorkerId) -> list[WorkerId]:
        """Everybody who has ever exchanged a message with ``end``, ascending."""
        found = {b for a, b in self._links if a == end} | {a for a, b in self._links if b == end}
        return sorted(found)

    def send(self, sender: WorkerId, to: WorkerId, lane: int, message: Message) -> None:
        self._links.setdefault((to, sender), _Link())
        if to in self.refusing and not self._cuts[sender, to]:
            self._carry(to, sender, MAIN, partial(self.ends[sender].ended, to, "refused the connection"))
        elif to in self.silent:
            ended = partial(self.ends[sender].ended, to, "does not answer")
            self._clock.after(KEEP_ALIVE_SECONDS, ended)
        else:
            self._carry(sender, to, lane, lambda: self.ends[to].arrived(message))

    def hang_up(self, sender: WorkerId, to: WorkerId, reason: str, *, lossy: bool = False) -> None:
        """``sender`` closes its connection with ``to``, which is told once it has read what was sent before;
        ``lossy``: what is under way is lost (the connection was reset)."""
        link = self._links.setdefault((sender, to), _Link())
        if link.hung_up:
            return
        link.hung_up = True
        if lossy:
            link.epoch += 1
            link.held.clear()
        link.arrivals = [max(link.arrivals)] * 3
        self._carry(sender, to, MAIN, partial(self.ends[to].ended, sender, reason))

    def die(self, end: WorkerId, *, machine: bool) -> None:
        """The process of ``end`` has ended; its kernel closes its connections, unless the ``machine`` is
        gone as well: its peers then find out by and by."""
        if machine:
            self.silent.add(end)
            for peer in self.peers(end):
                self._links.setdefault((end, peer), _Link()).epoch += 1
                self._give_up_after(KEEP_ALIVE_SECONDS, end, peer)
            return
        self.refusing.add(end)
        for peer in self.peers(end):
            # unread data makes the kernel reset the connection, and what is under way is lost
            self.hang_up(end, peer, "the connection was closed", lossy=self._random.random() < 0.3)

    def _give_up_after(self, seconds: float, end: WorkerId, peer: WorkerId) -> None:
        if (end, peer) not in self._links and (peer, end) not in self._links:
            return
        moment = seconds + self._random.uniform(0.0, 1.0)
        self._clock.after(moment, partial(self.ends[peer].ended, end, "does not answer"))

    def break_link(self, one: WorkerId, other: WorkerId) -> None:
        """A connection between two live ends is reset: both see it, and never get another one."""
        self.hang_up(one, other, "the connection was reset", lossy=True)
        self.hang_up(other, one, "the connection was reset", lossy=True)

    def cut(self, pairs: Iterable[tuple[WorkerId, WorkerId]], seconds: float) -> None:
        """Holds back what goes from the first to the second of each ordered pair, for ``seconds``.

        TCP gives a connection up that is cut for long.
        """
        for pair in pairs:
            self._cuts[pair] += 1
            self._clock.after(seconds, partial(self._heal, pair))
            if seconds > KEEP_ALIVE_SECONDS:
                self._give_up_after(KEEP_ALIVE_SECONDS, *pair)
                self._give_up_after(KEEP_ALIVE_SECONDS, pair[1], pair[0])

    def _heal(self, pair: tuple[WorkerId, WorkerId]) -> None:
        self._cuts[pair] -= 1
        if pair in self._links:
            self._clock.after(self._latency.draw(self._random), partial(self._flush, pair))

    def _flush(self, pair: tuple[WorkerId, WorkerId]) -> None:
        link = self._links[pair]
        while link.held and not self._cuts[pair]:
            link.held.popleft()()

    def _carry(self, sender: WorkerId, to: WorkerId, lane: int, action: Callable[[], None]) -> None:
        pair = (sender, to)
        link = self._links.setdefault(pair, _Link())
        moment = max(link.arrivals[lane], self._clock.now + self._latency.draw(self._random))
        link.arrivals[lane] = moment
        self._clock.at(moment, partial(self._arrive, pair, link.epoch, action))

    def _arrive(self, pair: tuple[WorkerId, WorkerId], epoch: int, action: Action) -> None:
        link = self._links[pair]
        if epoch < link.epoch:
            return
        if self._cuts[pair] or link.held:
            link.held.append(action)
        else:
            action()
