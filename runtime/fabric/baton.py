"""Which thread reads an endpoint's sockets: its receiver thread, or one that waits for a message anyway.

Leader and followers (Schmidt, Stal, Rohnert and Buschmann, Pattern-Oriented Software Architecture,
volume 2, 2000), made for an interpreter with one lock: a thread that reads its own message is spared being
woken by the one that has read it. Waking a thread costs more than the message, so a change of reader
wakes nobody: the receiver thread sleeps on an epoll instance that watches the selector's own, and a
thread that reads shuts and opens this gate, one system call each, without the sleeper noticing.
"""

from __future__ import annotations

import select
import selectors
import threading


class Baton:
    """Held by the one thread that reads what ``selector`` watches.

    Where there is no epoll the receiver thread alone can have the baton, and need not sleep.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._lock = threading.Lock()
        self.holder: int | None = None
        """The identifier of the thread that reads."""
        self._closed = False
        self._gate: select.epoll | None = None
        if isinstance(selector, selectors.EpollSelector):
            self._selector = selector.fileno()
            self._gate = select.epoll()
            # One shot: who wakes finds the gate shut behind it, until somebody has read and opens it.
            self._gate.register(self._selector, select.EPOLLIN | select.EPOLLONESHOT)

    @property
    def can_change_hands(self) -> bool:
        return self._gate is not None

    def sleep(self, timeout: float | None) -> bool:
        """The receiver thread: until there is something to read and nobody else to read it.

        ``timeout`` in seconds. Returns False when it has passed. Where there is no epoll: True at once.
        """
        return self._gate is None or bool(self._gate.poll(timeout, 1))

    def take(self) -> bool:
        """The receiver thread: whether it may read now. If not, who reads opens the gate afterwards."""
        if not self._lock.acquire(blocking=False):
            return False
        self.holder = threading.get_ident()
        return True

    def take_over(self) -> bool:
        """Any other thread: whether it may read now, in the receiver thread's place."""
        if self._gate is None or not self._lock.acquire(blocking=False):
            return False
        self.holder = threading.get_ident()
        self._gate.modify(self._selector, 0)
        return True

    def give(self) -> None:
        """Lets go of the baton: what comes from now on, or is unread, wakes the receiver thread."""
        self.holder = None
        self._lock.release()
        # After the release: a receiver thread that woke before it would find the baton taken and
        # sleep on, behind a gate that nobody opens.
        if self._gate is not None:
            try:
                self._gate.modify(self._selector, select.EPOLLIN | select.EPOLLONESHOT)
            except (OSError, ValueError):  # closed in between
                if not self._closed:
                    raise

    def close(self) -> None:
        """The receiver thread, at its end: waits until nobody reads, and nobody will again."""
        self._lock.acquire()
        self.abandon()

    def abandon(self) -> None:
        """Closes the gate's file descriptor and no more."""
        self._closed = True
        if self._gate is not None:
            self._gate.close()
