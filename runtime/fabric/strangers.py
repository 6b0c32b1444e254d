"""Connections that have not proved yet that they belong to the job."""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable
from functools import partial

from runtime.fabric.handshake import Acceptance, Refused
from runtime.fabric.links import tune
from runtime.plan import WorkerId

_log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 5.0
_MAX_STRANGERS = 1024  # then the oldest goes


class Strangers:
    """Accepts connections and lets them prove themselves; false while there are none.

    ``welcome`` is called with each that did; the selector then still watches its socket. Everything
    here runs in the thread that reads.
    """

    def __init__(
        self,
        worker: WorkerId,
        secret: bytes,
        selector: selectors.BaseSelector,
        welcome: Callable[[Acceptance], None],
    ) -> None:
        self._worker = worker
        self._secret = secret
        self._selector = selector
        self._welcome = welcome
        self._deadlines: dict[Acceptance, float] = {}  # the oldest comes first

    def __bool__(self) -> bool:
        return bool(self._deadlines)

    def patience(self) -> float | None:
        """Seconds until the oldest one's deadline; None if there is none."""
        deadline = next(iter(self._deadlines.values()), None)
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def accept(self, listener: socket.socket) -> None:
        """Takes in one connection, if one is there."""
        try:
            sock, _ = listener.accept()
        except OSError:  # it went away again, or there are no file descriptors left
            if self._deadlines:
                self._dismiss(next(iter(self._deadlines)))
            return
        tune(sock)
        sock.setblocking(False)
        if len(self._deadlines) >= _MAX_STRANGERS:
            self._dismiss(next(iter(self._deadlines)))
        stranger = Acceptance(sock, self._secret, self._worker)
        self._deadlines[stranger] = time.monotonic() + HANDSHAKE_SECONDS
        self._selector.register(sock, selectors.EVENT_READ, partial(self._authenticate, stranger))

    def dismiss_late(self) -> None:
        """Drops those whose time is over."""
        while self._deadlines and next(iter(self._deadlines.values())) <= time.monotonic():
            self._dismiss(next(iter(self._deadlines)))

    def close_sockets(self) -> None:
        for stranger in self._deadlines:
            stranger.sock.close()

    def _authenticate(self, stranger: Acceptance) -> None:
        if stranger not in self._deadlines:
            return
        try:
            if not stranger.advance():
                return
        except (OSError, Refused) as error:
            _log.info("worker %d dropped a connection: the other side %s", self._worker, error)
            self._dismiss(stranger)
            return
        del self._deadlines[stranger]
        self._welcome(stranger)

    def _dismiss(self, stranger: Acceptance) -> None:
        del self._deadlines[stranger]
        self._selector.unregister(stranger.sock)
        stranger.sock.close()
