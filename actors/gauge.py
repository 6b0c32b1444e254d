"""What the links between workers carry, measured by a worker that begins, beside its first step.

A few short messages and a few longer ones go to one peer on the control channel, whose receiving thread
answers each at once: no step waits for them, on either side. The shortest round trips count, so that what
else the machines are busy with does not.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch

from runtime.fabric.interface import CONTROL, Endpoint, EndpointClosed, Interrupted, Tag
from runtime.plan import Plan, WorkerId
from runtime.protocol import Echo, Echoed, Linked

SHORT, LONG = 8, 4
"""How many messages of each kind."""

LONG_BYTES = 1 << 20
"""So long that its way takes several times what every message does, and so short that nobody minds."""

PATIENCE_SECONDS = 5.0
"""For one answer. A link that is slower than that, or a peer that has gone, is not measured."""

_TAG = Tag(0, 0, 0, CONTROL)


def peer_of(worker: WorkerId, workers: tuple[WorkerId, ...], addresses: Mapping[WorkerId, str]) -> WorkerId:
    """Whom ``worker`` measures its link to: one of the next on another host, for stage groups are spread over
    failure domains and what passes within a host says little of the network; without such the next one.

    Workers of one host measure their links to different ones, where there are as many: one peer that answers
    them all at once would seem slow to each. Raises KeyError for a worker without an address.
    """
    host = {each: addresses[each].rpartition(":")[0] for each in workers}
    here = workers.index(worker)
    others = workers[here + 1 :] + workers[:here]
    away = [other for other in others if host[other] != host[worker]]
    if not away:
        return others[0]
    return away[sum(host[earlier] == host[worker] for earlier in workers[:here]) % len(away)]


class Gauge:
    """One worker's; it measures once, or until it has measured something. ``answer`` and ``answered`` are for
    the control channel's thread."""

    def __init__(self, worker: WorkerId, clock: Callable[[], float] = time.perf_counter) -> None:
        self._worker, self._clock = worker, clock
        self._numbers = itertools.count()  # never used twice: an answer may come after it was given up
        self._answers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._peer: WorkerId | None = None

    def begin(
        self,
        endpoint: Endpoint,
        plan: Plan,
        addresses: Mapping[WorkerId, str],
        tell: Callable[[Linked], None],
    ) -> None:
        """Measures beside what follows, and tells, if this worker has work and peers, and has not measured
        nor is about to."""
        workers = plan.workers
        if self._peer is not None or self._worker not in workers or len(workers) < 2:
            return
        peer = peer_of(self._worker, workers, addresses)
        endpoint.connect({peer: addresses[peer]})
        self._peer = peer

        def measure() -> None:
            found = None
            try:
                with suppress(EndpointClosed, Interrupted):
                    found = self._measured(endpoint, peer)
            finally:
                if found is None:
                    self._peer = None  # the next command tries again
            if found is not None:
                tell(found)

        threading.Thread(target=measure, name=f"gauge-{self._worker}", daemon=True).start()

    def answer(self, endpoint: Endpoint, sender: WorkerId, echo: Echo) -> None:
        """Answers one that this worker may not have been told of yet."""
        with suppress(EndpointClosed, Interrupted):
            endpoint.connect({sender: echo.address})
            endpoint.send(sender, _TAG, note=Echoed(echo.number))

    def answered(self, echoed: Echoed) -> None:
        self._answers.put(echoed.number)

    def _measured(self, endpoint: Endpoint, peer: WorkerId) -> Linked | None:
        payload = torch.zeros(LONG_BYTES, dtype=torch.uint8)
        fastest = {False: float("inf"), True: float("inf")}
        for k in range(SHORT + LONG):
            long, number = k >= SHORT, next(self._numbers)
            began = self._clock()
            endpoint.send(peer, _TAG, [payload] if long else [], Echo(number, endpoint.address))
            try:
                while self._answers.get(timeout=PATIENCE_SECONDS) != number:
                    pass  # an earlier try's
            except queue.Empty:
                return None
            fastest[long] = min(fastest[long], self._clock() - began)
        short, long_ = fastest[False], fastest[True]
        if long_ <= short:  # there is too much noise to tell them apart
            return None
        return Linked(self._worker, peer, short / 2, LONG_BYTES / (long_ - short))
