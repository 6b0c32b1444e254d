"""One end of the fabric on the simulated network: the real inbox, and no thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from runtime.fabric.inbox import Inbox
from runtime.fabric.interface import CONTROL, EndpointClosed, Message, Tag
from runtime.plan import WorkerId
from runtime.simulation.network import BACKGROUND, CONTROL_LANE, MAIN, Network
from runtime.simulation.process import Process, Waits

BACKGROUND_SECONDS = 0.004
"""Up to how long a background message waits until it is sent."""


class SimEndpoint:
    """Behaves as ``fabric.sockets.SocketEndpoint`` does. Waiting calls are generators (``Waits``)."""

    def __init__(
        self,
        worker: WorkerId,
        network: Network,
        process: Process,
        on_control: Callable[[Message], None],
        on_lost: Callable[[WorkerId, str], None],
    ) -> None:
        self.worker, self.process = worker, process
        self._network = network
        self._on_control, self._on_lost = on_control, on_lost
        self._inbox = Inbox(limit_bytes=1 << 62)
        self._early: dict[tuple[Tag, WorkerId], Message] = {}
        self._gone: set[WorkerId] = set()  # fenced here, or the link ended: sends vanish
        self._fenced: set[WorkerId] = set()  # declared lost: what they sent is dropped too
        self._background_free = 0.0
        self.closed = False
        assert worker not in network.ends, f"worker {worker} was here before"
        network.ends[worker] = self

    @property
    def generation(self) -> int:
        return self._inbox.generation

    # --- sending ----------------------------------------------------------------------------

    def send(self, to: WorkerId, tag: Tag, note: Any = None, *, background: bool = False) -> None:
        """See ``Endpoint.send``; ``note`` stands for tensors too. Raises Interrupted, EndpointClosed."""
        if self.closed:
            raise EndpointClosed("this endpoint is closed")
        if background:
            if not self._inbox.is_stale(tag):
                self._background_free = max(self._background_free, self.process.clock.now)
                self._background_free += self.process.random.uniform(0.0, BACKGROUND_SECONDS)
                late = partial(self._send_unless_stale, to, tag, note)
                self.process.after(self._background_free - self.process.clock.now, late)
            return
        self._inbox.admit(tag)
        self._transmit(to, tag, note, CONTROL_LANE if tag.what == CONTROL else MAIN)

    def _send_unless_stale(self, to: WorkerId, tag: Tag, note: Any) -> None:
        if not self._inbox.is_stale(tag) and not self.closed:
            self._transmit(to, tag, note, BACKGROUND)

    def _transmit(self, to: WorkerId, tag: Tag, note: Any, lane: int) -> None:
        message = Message(self.worker, tag, note=note)
        if to == self.worker:
            self.process.after(0.0, partial(self.arrived, message))
        elif to not in self._gone:
            assert to in self._network.ends, f"worker {to} has no known address"
            self._network.send(self.worker, to, lane, message)

    # --- receiving --------------------------------------------------------------------------

    def poll_any(self, tags: Iterable[Tag]) -> Message | None:
        """See ``Endpoint.poll_any``."""
        wanted = tuple(tags)
        message = self._inbox.poll_any(wanted)
        if message is None and self._early:
            channels = {tag[:4] for tag in wanted}
            key = next((key for key in self._early if key[0][:4] in channels), None)
            message = None if key is None else self._early.pop(key)
        return message

    def receive_any(self, tags: Iterable[Tag]) -> Waits[Message]:
        """See ``Endpoint.receive_any``."""
        wanted = tuple(tags)
        while (message := self.poll_any(wanted)) is None:
            yield None
        return message

    def receive(self, sender: WorkerId, tag: Tag) -> Waits[Message]:
        """See ``Endpoint.receive``: others of the channel that come earlier wait aside."""
        while (tag, sender) not in self._early:
            message = self._inbox.poll_any([tag])
            if message is None:
                yield None
            else:
                key = (message.tag, message.sender)
                assert key not in self._early, f"{self.worker} got {key} twice"
                self._early[key] = message
        return self._early.pop((tag, sender))

    def check(self) -> None:
        self._inbox.check()

    def acknowledge(self) -> int:
        return self._inbox.acknowledge()

    # --- membership -------------------------------------------------------------------------

    def interrupt(self, generation: int, lost: Iterable[WorkerId] = ()) -> None:
        """See ``Endpoint.interrupt``."""
        if generation < self._inbox.generation:
            return
        fenced = frozenset(lost) - {self.worker}
        linked = set(self._network.peers(self.worker))
        for peer in sorted((fenced & linked) - self._gone):
            self._network.hang_up(self.worker, peer, "closed the connection")
        self._gone |= fenced
        self._fenced |= fenced
        self._inbox.interrupt(generation, fenced)
        self._early = {
            key: message
            for key, message in self._early.items()
            if key[0].generation >= generation and key[1] not in fenced
        }
        self.process.wake()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._inbox.close()
            for peer in self._network.peers(self.worker):
                if peer not in self._gone:
                    self._network.hang_up(self.worker, peer, "closed the connection")
            self._network.refusing.add(self.worker)
            self.process.wake()

    # --- the network's side -----------------------------------------------------------------

    def arrived(self, message: Message) -> None:
        self.process.do(partial(self._take_in, message))

    def _take_in(self, message: Message) -> None:
        if self.closed or message.sender in self._fenced:
            return
        if message.tag.what == CONTROL:
            self._on_control(message)
        else:
            self._inbox.deliver(message, 0)
            self.process.wake()

    def ended(self, peer: WorkerId, reason: str) -> None:
        self.process.do(partial(self._lose, peer, reason))

    def _lose(self, peer: WorkerId, reason: str) -> None:
        if peer not in self._gone and not self.closed:
            self._gone.add(peer)
            self._network.hang_up(self.worker, peer, "closed the connection")
            self._on_lost(peer, reason)
