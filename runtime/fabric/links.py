"""One direction of one lane between two endpoints: who dials writes, who accepted reads."""

from __future__ import annotations

import contextlib
import logging
import queue
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from runtime.fabric.framing import Decoder
from runtime.fabric.handshake import Lane, dial
from runtime.plan import WorkerId

_log = logging.getLogger(__name__)

DIAL_SECONDS = 10.0
_BUFFERS_PER_CALL = 512  # below IOV_MAX (1024 on Linux and macOS)

HELD_LIMIT_BYTES = 64 << 20
"""What a link holds for a peer that reads nothing, before it counts as broken: half a million reports."""


def tune(sock: socket.socket) -> None:
    """No Nagle delay, and keep-alive so that a vanished machine shows on idle links in about 10 s.

    Buffer sizes are left to the kernel: setting them turns its autotuning off. There is no
    TCP_USER_TIMEOUT because it would also end links to peers that live but hold us back.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # Linux; macOS knows some of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class OutgoingLink:
    """Written to by any thread that holds ``lock``; watched for its end by the receiver.

    A peer that is stopped, or cut off, reads nothing and is not gone. ``write`` waits for it;
    ``write_or_hold`` does not, and ``release`` writes what was held as soon as the peer reads again.
    """

    def __init__(self, peer: WorkerId, lane: Lane) -> None:
        self.peer = peer
        self.lane = lane
        self.lock = threading.Lock()
        self.sock: socket.socket | None = None
        self.is_shut = False
        self.bytes_sent = self.messages_sent = 0
        self.releasing: threading.Thread | None = None
        """In ``release``."""
        self._held: deque[memoryview] = deque()
        self._held_bytes = 0

    def open(self, address: str, secret: bytes, worker: WorkerId) -> None:
        """Dials and shakes hands; ``lock`` is held. Raises OSError and handshake.Refused."""
        deadline = time.monotonic() + DIAL_SECONDS
        host, _, port = address.rpartition(":")
        family, kind, protocol, _, target = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )[0]
        sock = socket.socket(family, kind, protocol)
        self.sock = sock  # from here on ``shut`` ends the dialling too
        if self.is_shut:
            raise ConnectionAbortedError("the link was closed while it was made")
        tune(sock)
        sock.settimeout(DIAL_SECONDS)
        sock.connect(target)
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        dial(sock, secret, worker, self.peer, self.lane)
        sock.setblocking(False)

    def write(
        self, buffers: Sequence[bytes | memoryview], blocked: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Writes one message, or nothing, whatever happens meanwhile, or raises OSError; ``lock`` is held.

        Waits inside ``blocked()`` while the peer reads nothing.
        """
        assert self.sock is not None
        size = sum(map(len, buffers))
        try:
            count = self.sock.sendmsg(buffers[:_BUFFERS_PER_CALL]) if size else 0
        except BlockingIOError:
            count = 0
        if count < size:
            self._write_rest(buffers, count, blocked)
        self._count(size)

    def write_or_hold(self, buffers: Sequence[bytes | memoryview], *, fleeting: bool = False) -> bool:
        """Writes one message; holds what the peer's socket has no room for. Never waits; ``lock`` is held.

        A ``fleeting`` message is not held but dropped. True if from now on something is held, so that
        ``release`` has to be called. Raises OSError, also beyond ``HELD_LIMIT_BYTES``.
        """
        assert self.sock is not None
        size = sum(map(len, buffers))
        was_holding = bool(self._held)
        count = 0
        if size and not was_holding:
            with contextlib.suppress(BlockingIOError):
                count = self.sock.sendmsg(buffers[:_BUFFERS_PER_CALL])
        if count < size:
            if fleeting and not count:
                return False
            rest = memoryview(b"".join(buffers))[count:]
            if self._held_bytes + len(rest) > HELD_LIMIT_BYTES:
                raise OSError(f"it reads nothing, and {self._held_bytes >> 20} MiB are held for it")
            self._held.append(rest)
            self._held_bytes += len(rest)
        self._count(size)
        return bool(self._held) and not was_holding

    def release(self) -> None:
        """Writes what is held; waits for the peer, without ``lock``. Raises OSError."""
        assert self.sock is not None
        while True:
            self._wait_for_room()
            with self.lock:
                try:
                    self._write_held()
                except BlockingIOError:
                    continue
                finally:
                    if self.is_shut:
                        self._held.clear()
                return

    def _write_held(self) -> None:
        assert self.sock is not None
        while self._held:
            count = self.sock.send(self._held[0])
            self._held_bytes -= count
            self._held[0] = self._held[0][count:]
            if not self._held[0]:
                self._held.popleft()

    def _count(self, size: int) -> None:
        self.bytes_sent += size
        self.messages_sent += size > 0

    def _wait_for_room(self) -> None:
        """``shut`` ends this as well: the socket then polls as hung up."""
        assert self.sock is not None
        poll = select.poll()
        poll.register(self.sock, select.POLLOUT)
        poll.poll()

    def _write_rest(
        self,
        buffers: Sequence[bytes | memoryview],
        count: int,
        blocked: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Writes all but the first ``count`` bytes."""
        assert self.sock is not None
        left = [memoryview(b) for b in buffers if len(b)]
        first = 0
        while True:
            while first < len(left) and count >= len(left[first]):
                count -= len(left[first])
                first += 1
            if first == len(left):
                return
            left[first] = left[first][count:]
            try:
                count = self.sock.sendmsg(left[first : first + _BUFFERS_PER_CALL])
            except BlockingIOError:
                count = 0
                with blocked():
                    self._wait_for_room()

    def shut(self) -> None:
        """Ends the connection and wakes whoever dials or writes. Any thread, never waits."""
        self.is_shut = True
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def dispose(self) -> None:
        """Closes the socket after ``shut``, once its writer has let go of it."""
        self.shut()
        if self.releasing is not None and self.releasing is not threading.current_thread():
            self.releasing.join()
        with self.lock:
            if self.sock is not None:
                self.sock.close()


class IncomingLink:
    """Read by one thread at a time, the one that has the baton."""

    def __init__(self, peer: WorkerId, lane: Lane, sock: socket.socket) -> None:
        self.peer = peer
        self.lane = lane
        self.sock = sock
        self.decoder = Decoder(peer)


class SendQueue:
    """A thread, started when first needed, that does in order what nobody waits for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def put(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        self._jobs.put(job)

    def stop(self) -> None:
        """Ends the thread after the job at hand; jobs must be quick by then."""
        self._jobs.put(None)
        with self._lock:  # a thread that is there but has not been started cannot be waited for
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                _log.exception("a background send failed")
            del job  # let go of its tensors before the next one comes
