"""The fabric between processes: TCP. Who sends writes; who waits reads, or else the receiver thread.

Each sender dials its own links, at first use, one per lane (control, main, background), and only the
dialler writes on a link: so there is no race over who connects, and both sides see the end of a
process, on what they dialled and on what they accepted. Two processes on a virtual machine of two
cores: 0.16 ms round trip with a small tensor, where bare sockets take 0.05 ms (the rest is the interpreter,
on both sides), and 1.5 to 3 GB/s in tensors of 1 to 16 MB.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from runtime.fabric.framing import as_bytes, encode_head, on_host
from runtime.fabric.handshake import MIN_SECRET_BYTES, Lane, Refused
from runtime.fabric.inbox import Inbox, InboxEndpoint
from runtime.fabric.interface import (
    CONTROL,
    ControlCallback,
    EndpointClosed,
    LostCallback,
    Message,
    Tag,
)
from runtime.fabric.links import OutgoingLink, SendQueue
from runtime.fabric.receiver import Receiver, reason_of
from runtime.plan import WorkerId

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)


class SocketEndpoint(InboxEndpoint):
    """``interface.Endpoint`` over TCP.

    ``secret`` (at least 16 bytes) is shared by the whole job: peers prove that they know it before
    anything they send is parsed. Traffic itself is not encrypted (see ``handshake``). ``host`` is
    what is bound; ``advertise``, needed when ``host`` is a wildcard, is what others connect to.

    ``inbox_limit_bytes`` bounds messages that nobody has asked for yet: beyond it no further message
    is begun (one per link may be under way) unless a thread here is blocked, and TCP holds the senders
    back. Control links are always read. ``on_lost`` fires once per peer and never for a peer that
    was declared lost here or after ``close``; both callbacks run in the thread that reads, which is one
    that waits in ``receive`` or ``receive_any``, or else the endpoint's own.
    Raises ValueError for a bad secret or host and OSError if it cannot listen.
    """

    def __init__(
        self,
        worker: WorkerId,
        secret: bytes,
        *,
        host: str = "127.0.0.1",
        advertise: str | None = None,
        on_control: ControlCallback | None = None,
        on_lost: LostCallback | None = None,
        inbox_limit_bytes: int = 256 << 20,
    ) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(
                f"the job's secret has {len(secret)} bytes; use at least {MIN_SECRET_BYTES}, "
                "for example secrets.token_bytes(32)"
            )
        if host in ("", "0.0.0.0", "::") and not advertise:
            raise ValueError(f"host {host!r} is no address that others can reach; give advertise as well")
        self.worker = worker
        self._secret = secret
        self._on_control = on_control
        self._on_lost = on_lost
        self._inbox = Inbox(inbox_limit_bytes)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family, backlog=1024)
        shown = advertise or host
        port = listener.getsockname()[1]
        self._address = f"[{shown}]:{port}" if ":" in shown else f"{shown}:{port}"

        self._lock = threading.Lock()  # guards the tables below; never held while waiting
        self._closed = False
        self._addresses: dict[WorkerId, str] = {}
        self._outgoing: dict[tuple[WorkerId, Lane], OutgoingLink] = {}
        self._gone: set[WorkerId] = set()  # fenced here, or the link ended: sends vanish
        self._fenced: set[WorkerId] = set()  # declared lost: what they sent is dropped too

        self._background = SendQueue(f"fabric-background-{worker}")
        self._replies = SendQueue(f"fabric-control-{worker}")
        self._receiver = Receiver(self, worker, secret, listener, self._inbox)
        self._inbox.on_room = self._receiver.room
        self._inbox.reader = self._receiver
        self._receiver.thread.start()

    @property
    def address(self) -> str:
        return self._address

    def connect(self, addresses: Mapping[WorkerId, str]) -> None:
        with self._lock:
            self._addresses.update(addresses)

    # Sending: any thread.

    def send(
        self,
        to: WorkerId,
        tag: Tag,
        tensors: Sequence[Tensor] = (),
        note: Any = None,
        *,
        background: bool = False,
        fleeting: bool = False,
    ) -> None:
        """See ``Endpoint.send``. Raises Interrupted and EndpointClosed, and ValueError for a peer
        whose address is unknown or a note that is too large."""
        is_control = tag.what == CONTROL
        if self._closed:
            raise EndpointClosed("this endpoint is closed")
        if not background:
            self._inbox.admit(tag)
        elif self._inbox.is_stale(tag):
            return
        if to == self.worker:
            copies = [t.detach().to("cpu", copy=True) for t in tensors]
            size = sum(t.nbytes for t in copies)
            self._inbox.reserve(size)
            message = Message(to, tag, copies, note)
            if is_control:
                self._receiver.post(partial(self.arrived, message, size))
            else:
                self._inbox.deliver(message, size)
            return
        if to in self._gone:
            return
        if to not in self._addresses:
            raise ValueError(f"worker {to} has no known address here; call connect with it first")
        head = encode_head(tag, tensors, note)
        lane = Lane.CONTROL if is_control else Lane.BACKGROUND if background else Lane.MAIN
        if self._receiver.is_reading and not background:
            # Who reads must not wait for a peer's receiver, which may be waiting for this one.
            tensors = [t.detach().to("cpu", copy=True) for t in tensors]
            background = True
        if background:
            queue = self._replies if is_control else self._background
            queue.put(partial(self._transmit_unless_stale, to, lane, tag, head, tuple(tensors), fleeting))
        else:
            self._transmit(to, lane, head, tensors, fleeting)

    def _transmit_unless_stale(
        self, to: WorkerId, lane: Lane, tag: Tag, head: bytes, tensors: Sequence[Tensor], fleeting: bool
    ) -> None:
        if not self._inbox.is_stale(tag):
            self._transmit(to, lane, head, tensors, fleeting)

    def _transmit(
        self, to: WorkerId, lane: Lane, head: bytes, tensors: Sequence[Tensor], fleeting: bool
    ) -> None:
        buffers: list[bytes | memoryview] = [head]
        for tensor in tensors:
            buffers.append(as_bytes(on_host(tensor)))
        if lane is not Lane.CONTROL and (to, Lane.CONTROL) not in self._outgoing:
            # Dialled along with any other lane: the peer then has a link from here that it always
            # reads, and sees the end of this process even while it holds the other lanes back.
            self._write(to, Lane.CONTROL, ())
        self._write(to, lane, buffers, fleeting)

    def _write(
        self, to: WorkerId, lane: Lane, buffers: Sequence[bytes | memoryview], fleeting: bool = False
    ) -> None:
        """Writes on the link, which is made if need be. Vanishes if the peer is gone."""
        link = self._outgoing.get((to, lane))
        if link is None:
            with self._lock:
                if to in self._gone or self._closed:
                    return
                link = self._outgoing.setdefault((to, lane), OutgoingLink(to, lane))
        if not link.lock.acquire(blocking=False):
            with self._inbox.blocked():
                link.lock.acquire()
        try:
            if link.is_shut:  # the peer is gone, or this endpoint closed
                return
            if link.sock is None:
                link.open(self._addresses[to], self._secret, self.worker)
                self._receiver.post(partial(self._receiver.watch, link))
            if lane is not Lane.CONTROL:
                link.write(buffers, self._inbox.blocked)
            elif link.write_or_hold(buffers, fleeting=fleeting):
                name = f"fabric-held-{self.worker}-{to}"
                link.releasing = threading.Thread(target=self._release, args=(link,), name=name, daemon=True)
                link.releasing.start()
        except BaseException as error:
            self._broke(link, error)
            if isinstance(error, OSError | Refused):
                return
            raise
        finally:
            link.lock.release()

    def _release(self, link: OutgoingLink) -> None:
        try:
            link.release()
        except OSError as error:
            self._broke(link, error)

    def _broke(self, link: OutgoingLink, error: BaseException) -> None:
        """Half a message may be on the wire, so nothing can follow it."""
        self._receiver.post(partial(self._receiver.unwatch, link))  # first, or it sees but a closed link
        self._receiver.post(partial(self.ended, link.peer, reason_of(error)))
        link.shut()

    # Membership: any thread.

    def interrupt(self, generation: int, lost: Iterable[WorkerId] = ()) -> None:
        if generation < self._inbox.generation:
            return
        fenced = frozenset(lost) - {self.worker}
        if fenced:
            with self._lock:
                self._fenced |= fenced
                self._gone |= fenced
                links = [link for (peer, _), link in self._outgoing.items() if peer in fenced]
            for link in links:
                link.shut()
        self._inbox.interrupt(generation, fenced)
        if fenced:
            self._receiver.post(partial(self._retire, fenced))

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            links = list(self._outgoing.values())
        self._inbox.close()
        for link in links:
            link.shut()
        self._background.stop()
        self._replies.stop()
        self._receiver.post(self._receiver.stop)
        if not self._receiver.is_reading:
            self._receiver.thread.join()
        for link in links:
            link.dispose()

    def statistics(self) -> dict[str, int]:
        with self._lock:
            links = list(self._outgoing.values())
        return {
            "bytes_sent": sum(link.bytes_sent for link in links),
            "bytes_received": self._receiver.bytes_received,
            "messages_sent": sum(link.messages_sent for link in links),
            "inbox_bytes": self._inbox.bytes,
            "inbox_peak_bytes": self._inbox.peak_bytes,
        }

    # The thread that reads: what ``receiver.Owner`` asks for.

    def accepts(self, peer: WorkerId) -> bool:
        return peer not in self._gone and peer != self.worker

    def arrived(self, message: Message, size: int) -> None:
        if self._closed or message.sender in self._fenced:
            self._inbox.release(size)
        elif message.tag.what != CONTROL:
            self._inbox.deliver(message, size)
        else:
            if size:
                self._inbox.release(size)
            if self._on_control is not None:
                self._call(self._on_control, message)

    def ended(self, peer: WorkerId, reason: str) -> None:
        with self._lock:
            if peer in self._gone or self._closed:
                return
            self._gone.add(peer)
            links = [link for (other, _), link in self._outgoing.items() if other == peer]
        for link in links:
            self._receiver.unwatch(link)
        self._receiver.hear_out(peer)
        if self._on_lost is not None and not self._closed:
            self._call(self._on_lost, peer, reason)

    def _retire(self, peers: frozenset[WorkerId]) -> None:
        with self._lock:
            links = [link for (peer, _), link in self._outgoing.items() if peer in peers]
        for link in links:
            self._receiver.unwatch(link)
        for peer in peers:
            self._receiver.drop(peer)

    @staticmethod
    def _call(callback: Callable[..., None], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            _log.exception("a callback of the fabric failed; the receiver goes on")
