"""The reading side of a socket endpoint: everything that waits for bytes waits here, in one place.

One thread at a time reads: a thread that waits for a message does so itself (``lead``), and while none
waits, because the worker computes, the receiver thread does. See ``baton``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from runtime.fabric.baton import Baton
from runtime.fabric.framing import STAGING_BYTES
from runtime.fabric.handshake import Acceptance, Lane, Refused
from runtime.fabric.inbox import Inbox, Waiter
from runtime.fabric.interface import Message
from runtime.fabric.links import IncomingLink, OutgoingLink
from runtime.fabric.strangers import Strangers
from runtime.plan import WorkerId

_log = logging.getLogger(__name__)

_READS_PER_TURN = 16  # of one link before the others get their turn


class Owner(Protocol):
    """What the receiver asks of its endpoint; all calls come from the thread that reads."""

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

    Only ``post``, ``room``, ``wake`` and ``lead`` may be called from any thread; everything else runs as an
    errand in the thread that reads. A link is paused, at the head of a message, while the inbox is full;
    control links never are. Unexpected trouble with one link ends that link and no other.
    """

    def __init__(
        self, owner: Owner, worker: WorkerId, secret: bytes, listener: socket.socket, inbox: Inbox
    ) -> None:
        self._owner = owner
        self._worker = worker
        self._listener = listener
        self._inbox = inbox
        self.bytes_received = 0
        self._selector = selectors.DefaultSelector()
        self._incoming: set[IncomingLink] = set()
        self._strangers = Strangers(worker, secret, self._selector, self._welcome)
        self._paused: set[IncomingLink] = set()
        self._errands: deque[Callable[[], None]] = deque()
        self._waker, self._woken = socket.socketpair()
        self._stopped = False
        self._baton = Baton(self._selector)
        self._waiter = _NEVER_SERVED  # who reads, and may leave bulk to others once it has what it wants
        reactions = {self._woken: self._run_errands, listener: partial(self._strangers.accept, listener)}
        for sock, react in reactions.items():
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ, react)
        self._waker.setblocking(False)
        # A forked child (a data loader's, say) must not keep the links of a dead parent alive.
        os.register_at_fork(after_in_child=partial(_abandon, weakref.ref(self)))
        self.thread = threading.Thread(target=self._run, name=f"fabric-{worker}", daemon=True)

    # Any thread.

    @property
    def is_reading(self) -> bool:
        """Whether the calling thread is the one that reads: it runs a callback, or an errand."""
        return self._baton.holder == threading.get_ident()

    def post(self, errand: Callable[[], None]) -> None:
        """Has the thread that reads do something soon. Never waits."""
        self._errands.append(errand)
        self.wake()

    def wake(self) -> None:
        """Wakes the thread that reads."""
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nobody is there
            self._waker.send(b"\0")

    def room(self) -> None:
        """The inbox may have room again."""
        if self._paused:
            self.post(self._resume)

    def lead(self, waiter: Waiter) -> None:
        """Reads in the calling thread while it waits. Returns at once where another thread reads.

        Ctrl-C passes through: if it comes between two bytes of a link, that link ends.
        """
        import torch  # the controller, which waits for no message, does without it

        if torch.is_inference_mode_enabled():  # it would mark every tensor that is made here
            return
        if not self._baton.take_over():
            return
        try:
            self._waiter = waiter
            while waiter.waiting and not self._stopped:
                self._turn(self._strangers.patience())
        except Exception:
            _log.exception("the receiver of worker %d failed", self._worker)
            self._stopped = True
            self._inbox.close()  # as ``_run`` does
        finally:
            if self._strangers or self._stopped:
                self.wake()  # the receiver thread does not know of their deadlines, or of its end
            self._waiter = _NEVER_SERVED
            self._baton.give()

    # Errands: the thread that reads.

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
            self._read(link, all_there_is=True)

    # The loop.

    def _run(self) -> None:
        patience = None
        try:
            while not self._stopped:
                self._baton.sleep(patience)
                patience = None
                if self._baton.take():
                    try:
                        self._turn(0.0 if self._baton.can_change_hands else self._strangers.patience())
                        patience = self._strangers.patience()
                    finally:
                        self._baton.give()
        finally:
            self._inbox.close()  # should this thread ever fail, nobody must wait for it for ever
            self._baton.close()
            self._close_sockets()

    def _turn(self, timeout: float | None) -> None:
        before = self.bytes_received
        for key, _ in self._selector.select(timeout):
            key.data()  # copes with a link that an earlier event of the same turn has ended
            if self.bytes_received - before > STAGING_BYTES and not self._waiter.waiting:
                return  # bulk is not for a thread that has what it wants; small messages are read anyway
        if self._strangers:
            self._strangers.dismiss_late()

    def _run_errands(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        for _ in range(len(self._errands)):
            self._errands.popleft()()

    def _welcome(self, proved: Acceptance) -> None:
        if not self._owner.accepts(proved.dialler):
            self._unregister(proved.sock)
            proved.sock.close()
            return
        link = IncomingLink(proved.dialler, proved.lane, proved.sock)
        self._incoming.add(link)
        self._selector.modify(link.sock, selectors.EVENT_READ, partial(self._read, link))
        self._read(link)

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

    def _read(self, link: IncomingLink, *, all_there_is: bool = False) -> None:
        if link not in self._incoming or link in self._paused:
            return
        try:
            if not self._take_messages(link) or link not in self._incoming:  # where it had paused
                return
            for _ in range(_READS_PER_TURN):
                space = link.decoder.space()
                count = link.sock.recv_into(space)
                if count == 0:
                    self._end(link, "closed the connection")
                    return
                self.bytes_received += count
                link.decoder.filled(space, count)
                if not self._take_messages(link) or link not in self._incoming:
                    return
                if count < len(space) <= STAGING_BYTES:
                    # Nothing more is there now. Asking the kernel would only hold up the thread that
                    # has what it waits for; a large tensor's next bytes, though, are about to come.
                    return
                if not (all_there_is or self._waiter.waiting):
                    return
        except BlockingIOError:
            return
        except Exception as error:  # whatever it is, it is this link's trouble alone
            self._end(link, reason_of(error))
        except BaseException as error:  # Ctrl-C in a thread that leads: half a message may be lost
            self.post(partial(self._end, link, reason_of(error)))
            raise

    def _take_messages(self, link: IncomingLink) -> bool:
        """Delivers what has come of the link's bytes; False if the link must pause."""
        decoder = link.decoder
        while True:
            if decoder.is_begun:
                size = decoder.payload
                whole, message = decoder.message()
                if not whole:
                    return True
                if message is not None:
                    self._owner.arrived(message, size)
                    if link not in self._incoming:
                        return True
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
            if not stale and head.size:
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
        self._strangers.close_sockets()
        for link in self._incoming:
            link.sock.close()
        self._listener.close()
        self._selector.close()
        self._waker.close()
        self._woken.close()


_NEVER_SERVED = Waiter(lambda *_: False)
"""What the receiver thread reads for: everybody."""


def _abandon(reference: weakref.ref[Receiver]) -> None:
    """In a forked child: lets go of the parent's sockets. They stay open in the parent."""
    receiver = reference()
    if receiver is not None and not receiver._stopped:
        outgoing = [key.fileobj for key in receiver._selector.get_map().values()]
        for sock in outgoing:
            if isinstance(sock, socket.socket):
                sock.close()
        receiver._baton.abandon()
        receiver._close_sockets()
