"""A worker's line to the controller, whoever that is at the moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from runtime.fabric.interface import CONTROL, Endpoint, EndpointClosed, Interrupted, Tag
from runtime.plan import WorkerId
from runtime.protocol import (
    Beat,
    Greeting,
    Heard,
    Here,
    Leaving,
    Linked,
    PeerLost,
    Probe,
    Report,
    Timed,
)
from runtime.pulse import Pulse

_TAG = Tag(0, 0, 0, CONTROL)

GREETERS = 16
"""Threads that greet peers. To most of them there is no link yet, and where packets are swallowed making one
takes long: others must not be accused of that."""


class Line:
    """Reports go out from any thread. A controller that is gone is not waited for: what must not get lost is
    told again to the next one. Nor is one that reads nothing: what it has to know is held for it.
    """

    endpoint: Endpoint
    """Set before anything is told."""

    def __init__(self, worker: WorkerId, controller: WorkerId) -> None:
        self._worker = worker
        self.controller = controller
        self._lost_at: float | None = None
        self._untold: list[Report] = []
        self._notice: Leaving | None = None
        self._linked: Linked | None = None
        self._heard: dict[int, set[WorkerId]] = {}
        self._answered = 0

    @property
    def is_open(self) -> bool:
        """Whether the controller is there, for all that is known."""
        return self._lost_at is None

    def tell(self, report: Report | Timed) -> None:
        fleeting = isinstance(report, Beat | Timed)
        with suppress(EndpointClosed, Interrupted):
            self.endpoint.send(self.controller, _TAG, note=report, fleeting=fleeting)

    def tell_surely(self, report: Report, *, only: bool = False) -> None:
        """Tells it again to a controller that is started anew; ``only``: and nothing of what was told surely
        before. For one thread at a time."""
        self._untold = [report] if only else [*self._untold, report]
        self.tell(report)

    def notice(self, reason: str, deadline: float | None) -> None:
        """This worker is to go; ``deadline`` is in seconds from now."""
        self._notice = Leaving(self._worker, reason, deadline)
        self.tell(self._notice)

    def linked(self, linked: Linked) -> None:
        """What a link carries is measured once, so every later controller is told of it."""
        self._linked = linked
        self.tell(linked)

    def broke(self) -> None:
        """The controller is gone. That does not stop training: everything needed is between the workers."""
        self._lost_at = time.monotonic()

    def wait_on(self) -> None:
        """A controller that was started anew is on its way."""
        if not self.is_open:
            self._lost_at = time.monotonic()

    def attach(self, controller: WorkerId, address: str) -> None:
        """Another controller has taken over."""
        self.endpoint.connect({controller: address})
        self.controller, self._lost_at = controller, None

    def introduce(self, here: Here, gone: Collection[WorkerId]) -> None:
        """Tells a new controller where this worker stands, what the last one may not have heard, and which
        peers are ``gone``."""
        self.tell(here)
        if self._linked is not None:
            self.tell(self._linked)
        for report in list(self._untold):
            self.tell(report)
        for peer in sorted(gone):
            self.tell(PeerLost(self._worker, peer, "lost while there was no controller"))
        if self._notice is not None:
            self.tell(self._notice)

    def beat(
        self,
        pulse: Pulse,
        ended: threading.Event,
        beat_seconds: float,
        orphan_seconds: float,
        on_beat: Callable[[], None],
    ) -> bool:
        """Tells of this worker's life until ``ended``; True if no controller came back in time before."""
        while not ended.wait(beat_seconds):
            on_beat()
            lost_at = self._lost_at
            if lost_at is None:
                self.tell(Beat(self._worker, pulse.progress, pulse.computing()))
            elif time.monotonic() - lost_at > orphan_seconds:
                return True
        return False

    def greeted(self, peer: WorkerId, greeting: Greeting) -> None:
        """A peer may have been asked before this worker is, and may answer when nobody listens any more."""
        if greeting.number > self._answered:
            self._heard.setdefault(greeting.number, set()).add(peer)

    def answer(self, probe: Probe) -> None:
        """Greets all peers, and tells after a while whose greetings have come."""
        greeters = ThreadPoolExecutor(GREETERS, thread_name_prefix="greeting")
        for peer in probe.peers:
            if peer != self._worker:
                greeters.submit(self._greet, peer, Greeting(probe.number))
        greeters.shutdown(wait=False)

        def report() -> None:
            self._answered = max(self._answered, probe.number)
            heard = frozenset(self._heard.pop(probe.number, ()))
            self.tell(Heard(self._worker, probe.number, heard))

        timer = threading.Timer(probe.seconds, report)
        timer.daemon = True
        timer.start()

    def _greet(self, peer: WorkerId, greeting: Greeting) -> None:
        with suppress(EndpointClosed, Interrupted):
            self.endpoint.send(peer, _TAG, note=greeting)
