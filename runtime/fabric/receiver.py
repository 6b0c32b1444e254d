"""The receiver thread of a socket endpoint: everything that waits for bytes waits here, in one place."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from runtime.fabric.framing import STAGING_BYTES
from runtime.fabric.handshake import Acceptance, Lane, Refused
from runtime.fabric.inbox import Inbox
from runtime.fabric.interface import Message
from runtime.fabric.links import IncomingLink, OutgoingLink, tune
from runtime.plan import WorkerId

_log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 5.0
_MAX_STRANGERS = 1024  # connections that have not proved themselves yet; then the oldest goes
_READS_PER_TURN = 16  # of one link before the others get their turn


class Owner(Protocol):
    """What the receiver asks of its endpoint; all calls come from the receiver thread."""

    def accepts(self, peer: WorkerId) -> bool:
        """Whether a new link from this peer may be made."""
        ...

    def arrived(self, message: Message, size: int) -> None:
        """Takes a message whose ``size`` bytes are reserved in the inbox."""
        ...

    def ended(self, peer: WorkerId, reason: str) -> None:
        """A link to or from the peer ended."""
        ...


def reason_of(error: BaseException) -> str:
    """Why a link ended, as words after "worker 3 "."""
    if isinstance(error, Refused) or (isinstance(error, ConnectionError) and error.errno is None):
        return str(error)
    if isinstance(error, OSError):
        return f"cannot be reached any more ({error.strerror or error})"
    return f"sent or was sent an unusable message ({type(error).__name__}: {error})"


class Receiver:
    """Accepts, authenticates and reads incoming links, and watches outgoing ones for their end.

    Only ``post`` and ``room`` may be called from other threads; everything else runs as an errand
    posted to this thread. A link is paused, at the head of a message, while the inbox is full;
    control links never are. Unexpected trouble with one link ends that link and no other.
    """

    def __init__(
        self, owner: Owner, worker: WorkerId, secret: bytes, listener: socket.socket, inbox: Inbox
    ) -> None:
        self._owner = owner
        self._worker = worker
        self._secret = secret
        self._listener = listener
        self._inbox = inbox
        self.bytes_received = 0
        self._selector = selectors.DefaultSelector()
        self._incoming: set[IncomingLink] = set()
        self._strangers: dict[Acceptance, float] = {}  # -> deadline; the oldest comes first
        self._paused: set[IncomingLink] = set()
        self._errands: deque[Callable[[], None]] = deque()
        self._waker, self._woken = socket.socketpair()
        self._stopped = False
        for sock, react in ((self._woken, self._run_errands), (listener, self._accept)):
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ, react)
        self._waker.setblocking(False)
        # A forked child (a data loader's, say) must not keep the links of a dead parent alive.
        os.register_at_fork(after_in_child=partial(_abandon, weakref.ref(self)))
        self.thread = threading.Thread(target=self._run, name=f"fabric-{worker}", daemon=True)

    # Any thread.

    def post(self, errand: Callable[[], None]) -> None:
        """Has the receiver thread do something soon. Never waits."""
        self._errands.append(errand)
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nobody is there
            self._waker.send(b"\0")

    def room(self) -> None:
        """The inbox may have room again."""
        if self._paused:
            self.post(self._resume)

    # Errands: the receiver thread.

    def stop(self) -> None:
        self._stopped = True

    def watch(self, link: OutgoingLink) -> None:
        """Reports the end of a link that was dialled here."""
        assert link.sock is not None
        if link.is_shut:
            link.dispose()
        else:
            self._selector.register(link.sock, selectors.EVENT_READ, partial(self._outgoing_ended, link))

    def unwatch(self, link: OutgoingLink) -> None:
        """Closes an outgoing link."""
        link.shut()
        if link.sock is not None:
            self._unregister(link.sock)
        link.dispose()

    def drop(self, peer: WorkerId) -> None:
        """Closes every link from this peer."""
        for link in [link for link in self._incoming if link.peer == peer]:
            self._close(link)

    def hear_out(self, peer: WorkerId) -> None:
        """Reads what the peer's control links still hold, such as a farewell before its end."""
        for link in [x for x in self._incoming if x.peer == peer and x.lane is Lane.CONTROL]:
            self._read(link)

    # The loop.

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._turn()
        finally:
            self._inbox.close()  # should this thread ever fail, nobody must wait for it for ever
            self._close_sockets()

    def _turn(self) -> None:
        deadline = next(iter(self._strangers.values()), None)
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        for key, _ in self._selector.select(timeout):
            key.data()  # copes with a link that an earlier event of the same turn has ended
        while self._strangers and next(iter(self._strangers.values())) <= time.monotonic():
            self._dismiss(next(iter(self._strangers)))

    def _run_errands(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        for _ in range(len(self._errands)):
            self._errands.popleft()()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it went away again, or there are no file descriptors left
            if self._strangers:
                self._dismiss(next(iter(self._strangers)))
            return
        tune(sock)
        sock.setblocking(False)
        if len(self._strangers) >= _MAX_STRANGERS:
            self._dismiss(next(iter(self._strangers)))
        stranger = Acceptance(sock, self._secret, self._worker)
        self._strangers[stranger] = time.monotonic() + HANDSHAKE_SECONDS
        self._selector.register(sock, selectors.EVENT_READ, partial(self._authenticate, stranger))

    def _authenticate(self, stranger: Acceptance) -> None:
        if stranger not in self._strangers:
            return
        try:
            if not stranger.advance():
                return
        except (OSError, Refused) as error:
            _log.info("worker %d dropped a connection: the other side %s", self._worker, error)
            self._dismiss(stranger)
            return
        if not self._owner.accepts(stranger.dialler):
            self._dismiss(stranger)
            return
        del self._strangers[stranger]
        link = IncomingLink(stranger.dialler, stranger.lane, stranger.sock)
        self._incoming.add(link)
        self._selector.modify(link.sock, selectors.EVENT_READ, partial(self._read, link))
        self._read(link)

    def _dismiss(self, stranger: Acceptance) -> None:
        del self._strangers[stranger]
        self._unregister(stranger.sock)
        stranger.sock.close()

    def _outgoing_ended(self, link: OutgoingLink) -> None:
        assert link.sock is not None
        if link.sock.fileno() < 0:
            return
        reason = "closed the connection"
        try:
            if link.sock.recv(1):
                reason = "answered where nothing is to be said"
        except BlockingIOError:
            return
        except OSError as error:
            reason = reason_of(error)
        self.unwatch(link)
        self._owner.ended(link.peer, reason)

    def _read(self, link: IncomingLink) -> None:
        if link not in self._incoming or link in self._paused:
            return
        try:
            for _ in range(_READS_PER_TURN):
                if not self._take_messages(link) or link not in self._incoming:
                    return
                space = link.decoder.space()
                count = link.sock.recv_into(space)
                if count == 0:
                    self._end(link, "closed the connection")
                    return
                self.bytes_received += count
                link.decoder.filled(space, count)
                if count < len(space) <= STAGING_BYTES:
                    # Nothing more is there now. Asking the kernel would only hold up the thread that
                    # has just been woken; a large tensor's next bytes, though, are about to come.
                    self._take_messages(link)
                    return
            self._take_messages(link)
        except BlockingIOError:
            return
        except Exception as error:  # whatever it is, it is this link's trouble alone
            self._end(link, reason_of(error))

    def _take_messages(self, link: IncomingLink) -> bool:
        """Delivers what has come of the link's bytes; False if the link must pause."""
        decoder = link.decoder
        while True:
            size = decoder.unfinished_bytes
            whole, message = decoder.message()
            if whole:
                if message is not None:
                    self._owner.arrived(message, size)
                if link not in self._incoming:
                    return True
                continue
            head = decoder.head()
            if head is None:
                return True
            stale = self._inbox.is_stale(head.tag)
            if not stale and link.lane is not Lane.CONTROL and self._inbox.full():
                # In this order: who makes room looks whether anything is paused, after making it.
                self._paused.add(link)
                if self._inbox.full():
                    self._unregister(link.sock)
                    return False
                self._paused.discard(link)
            if not stale:
                self._inbox.reserve(head.size)
            decoder.begin(discard=stale)

    def _resume(self) -> None:
        for link in list(self._paused):
            if self._inbox.full():
                return
            self._paused.discard(link)
            self._selector.register(link.sock, selectors.EVENT_READ, partial(self._read, link))
            self._read(link)

    def _end(self, link: IncomingLink, reason: str) -> None:
        self._close(link)
        self._owner.ended(link.peer, reason)

    def _close(self, link: IncomingLink) -> None:
        if link not in self._incoming:
            return
        self._incoming.discard(link)
        self._paused.discard(link)
        self._inbox.release(link.decoder.unfinished_bytes)
        self._unregister(link.sock)
        link.sock.close()

    def _unregister(self, sock: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):  # not registered (paused, never watched)
            self._selector.unregister(sock)

    def _close_sockets(self) -> None:
        """Closes what was accepted here and the listener, and nothing that belongs to others."""
        for stranger in self._strangers:
            stranger.sock.close()
        for link in self._incoming:
            link.sock.close()
        self._listener.close()
        self._selector.close()
        self._waker.close()
        self._woken.close()


def _abandon(reference: weakref.ref[Receiver]) -> None:
    """In a forked child: lets go of the parent's sockets. They stay open in the parent."""
    receiver = reference()
    if receiver is not None and not receiver._stopped:
        outgoing = [key.fileobj for key in receiver._selector.get_map().values()]
        for sock in outgoing:
            if isinstance(sock, socket.socket):
                sock.close()
        receiver._close_sockets()
