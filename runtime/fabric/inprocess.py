"""The fabric's twin for tests and simulation: workers are threads of one process.

Messages go straight into the receiver's ``Inbox``, the one that sockets use too, and tensors are cloned
on the way, as notes are encoded, so workers share nothing. Each endpoint has one
thread of its own for what sockets do on their receiver and background threads: control messages,
reports of losses, background sends. The inbox limit is not enforced: nothing holds a sender back.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from runtime.fabric import notes
from runtime.fabric.inbox import Inbox, InboxEndpoint
from runtime.fabric.interface import (
    CONTROL,
    ControlCallback,
    EndpointClosed,
    LostCallback,
    Message,
    Tag,
)
from runtime.plan import WorkerId

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)


class InProcessFabric:
    """Makes endpoints that know each other, and kills them."""

    def __init__(self) -> None:
        # Held for every delivery: a kill happens wholly before or wholly after each message.
        self.lock = threading.RLock()
        self.endpoints: dict[WorkerId, InProcessEndpoint] = {}

    def endpoint(
        self,
        worker: WorkerId,
        *,
        on_control: ControlCallback | None = None,
        on_lost: LostCallback | None = None,
    ) -> InProcessEndpoint:
        """Makes the endpoint of a new worker. Ids are never used twice."""
        with self.lock:
            assert worker not in self.endpoints, f"worker {worker} was here before"
            endpoint = InProcessEndpoint(self, worker, on_control, on_lost)
            self.endpoints[worker] = endpoint
        return endpoint

    def kill(self, worker: WorkerId, reason: str = "died") -> None:
        """As SIGKILL would: every call of the worker raises EndpointClosed from now on, what it had
        queued is never sent, and all who had exchanged messages with it are told, in ascending order.
        """
        endpoint = self.endpoints[worker]
        endpoint.end(reason)

    def close(self) -> None:
        """Closes every endpoint."""
        for endpoint in list(self.endpoints.values()):
            endpoint.close()


class InProcessEndpoint(InboxEndpoint):
    """``interface.Endpoint`` in one process; made by ``InProcessFabric.endpoint``."""

    def __init__(
        self,
        fabric: InProcessFabric,
        worker: WorkerId,
        on_control: ControlCallback | None,
        on_lost: LostCallback | None,
    ) -> None:
        self.worker = worker
        self._fabric = fabric
        self._on_control = on_control
        self._on_lost = on_lost
        self._inbox = Inbox(limit_bytes=1 << 62)
        self._closed = False
        self._linked: set[WorkerId] = set()
        self._gone: set[WorkerId] = set()  # fenced, or told of their end: sends vanish
        self._fenced: set[WorkerId] = set()  # declared lost: what they sent is dropped too
        self._bytes_sent = self._bytes_received = self._messages_sent = 0
        self._errands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"in-process-{worker}", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"in-process:{self.worker}"

    def connect(self, addresses: Mapping[WorkerId, str]) -> None:
        """Nothing to learn: the fabric knows everybody."""
        if self._closed:
            raise EndpointClosed("this endpoint is closed")

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
        """See ``Endpoint.send``; here everybody reads. Raises Interrupted and EndpointClosed, and ValueError
        for an unknown peer."""
        if self._closed:
            raise EndpointClosed("this endpoint is closed")
        if to not in self._fabric.endpoints:
            raise ValueError(f"worker {to} has no endpoint on this fabric; make one first")
        if background:
            self._errands.put(partial(self._deliver_unless_stale, to, tag, tuple(tensors), note))
        else:
            self._inbox.admit(tag)
            self._deliver(to, tag, tensors, note)

    def _deliver_unless_stale(self, to: WorkerId, tag: Tag, tensors: Sequence[Tensor], note: Any) -> None:
        if not self._inbox.is_stale(tag) and not self._closed:
            self._deliver(to, tag, tensors, note)

    def _deliver(self, to: WorkerId, tag: Tag, tensors: Sequence[Tensor], note: Any) -> None:
        copies = [t.detach().to("cpu", copy=True).contiguous() for t in tensors]
        message = Message(self.worker, tag, copies, notes.loads(notes.dumps(note)))
        size = sum(t.nbytes for t in copies)
        with self._fabric.lock:
            if self._closed:
                raise EndpointClosed("this endpoint is closed")
            target = self._fabric.endpoints[to]
            if to in self._gone:
                return
            if target._closed or self.worker in target._gone:
                self._told_lost(to, "refused the connection")
                return
            self._messages_sent += 1
            if to != self.worker:
                self._linked.add(to)
                target._linked.add(self.worker)
                self._bytes_sent += size
                target._bytes_received += size
            if tag.what == CONTROL:
                target._errands.put(partial(target._control, message))
            else:
                target._inbox.reserve(size)
                target._inbox.deliver(message, size)

    def interrupt(self, generation: int, lost: Iterable[WorkerId] = ()) -> None:
        if generation < self._inbox.generation:
            return
        fenced = frozenset(lost) - {self.worker}
        with self._fabric.lock:
            new = sorted(fenced & self._linked - self._gone)
            self._gone |= fenced
            self._fenced |= fenced
            for peer in new:
                self._fabric.endpoints[peer]._told_lost(self.worker, "closed the connection")
        self._inbox.interrupt(generation, fenced)

    def close(self) -> None:
        self.end("closed the connection")
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def end(self, reason: str) -> None:
        """Ends this endpoint at once and tells its peers why. Idempotent."""
        with self._fabric.lock:
            if self._closed:
                return
            self._closed = True
            self._errands.put(None)
            for peer in sorted(self._linked - self._gone):
                self._fabric.endpoints[peer]._told_lost(self.worker, reason)
        self._inbox.close()

    def statistics(self) -> dict[str, int]:
        return {
            "bytes_sent": self._bytes_sent,
            "bytes_received": self._bytes_received,
            "messages_sent": self._messages_sent,
            "inbox_bytes": self._inbox.bytes,
            "inbox_peak_bytes": self._inbox.peak_bytes,
        }

    def _told_lost(self, peer: WorkerId, reason: str) -> None:
        """The fabric's lock is held."""
        if peer not in self._gone and not self._closed:
            self._gone.add(peer)
            if self._on_lost is not None:
                self._errands.put(partial(self._on_lost, peer, reason))

    def _control(self, message: Message) -> None:
        if self._on_control is not None and message.sender not in self._fenced:
            self._on_control(message)

    def _run(self) -> None:
        while (errand := self._errands.get()) is not None:
            if self._closed:
                return
            try:
                errand()
            except EndpointClosed:
                return
            except Exception:
                _log.exception("a callback of the fabric failed; the endpoint goes on")
