"""Connections to an endpoint from outside, and waiting for what it does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from runtime.fabric.sockets import SocketEndpoint

WAIT = 20  # seconds until a test that hangs fails


def until(true: Callable[[], bool]) -> None:
    """Waits for a state that nobody announces."""
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def call(endpoint: SocketEndpoint) -> socket.socket:
    host, port = endpoint.address.split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT)


def is_dropped(sock: socket.socket) -> bool:
    """Whether the other side ends the connection (WAIT passes if it does not)."""
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True
