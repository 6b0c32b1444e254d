"""The TCP connections that gloo made for a group, so that they can be cut.

Gloo has no way to end a collective that waits: its ``abort`` wakes nobody (measured with torch 2.13 and a
stopped peer). But every wait ends at once when the connection it waits for is shut down. A connection is
known by the port of the listener that one of its ends belongs to. Linux only.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing, suppress

Ports = frozenset[int]


def listening() -> Ports:
    """The TCP ports on which this process listens."""
    ports = set()
    for each in _sockets():
        with suppress(OSError):
            if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                ports.add(each.getsockname()[1])
    return frozenset(ports)


def cut(mine: Ports, others: Ports) -> int:
    """Shuts down every connection of this process that came in on a port of ``mine`` or went out to one of
    ``others``; returns how many."""
    count = 0
    for each in _sockets():
        with suppress(OSError):  # not connected, or gone meanwhile
            there = each.getpeername()[1]  # of a connection only: gloo aborts if its listener is shut down
            if each.getsockname()[1] in mine or there in others:
                each.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def _sockets() -> Iterator[socket.socket]:
    """Every TCP socket of this process, as a duplicate that is closed again."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with closing(socket.socket(fileno=os.dup(int(name)))) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                    yield found
