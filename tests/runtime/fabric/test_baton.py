"""Who reads, and what the receiver thread sleeps through."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator

import pytest

from runtime.fabric.baton import Baton


class Readable:
    """A selector that watches one socket, which has a byte to read."""

    def __init__(self, kind: type[selectors.BaseSelector]) -> None:
        self.selector = kind()
        self.near, self.far = socket.socketpair()
        self.selector.register(self.near, selectors.EVENT_READ)
        self.baton = Baton(self.selector)
        self.far.send(b"x")

    def close(self) -> None:
        self.baton.close()
        self.selector.close()
        self.near.close()
        self.far.close()


@pytest.fixture
def readable() -> Iterator[Readable]:
    readable = Readable(selectors.EpollSelector)
    yield readable
    readable.close()


def test_the_receiver_thread_wakes_once_until_somebody_has_read(readable: Readable) -> None:
    baton = readable.baton
    assert baton.sleep(0)
    assert not baton.sleep(0)
    assert baton.take()
    assert not baton.sleep(0)
    baton.give()
    assert baton.sleep(0), "what is unread wakes it again"
    assert baton.take()
    readable.near.recv(1)
    baton.give()
    assert not baton.sleep(0)
    readable.far.send(b"y")
    assert baton.sleep(0)


def test_the_receiver_thread_sleeps_while_another_reads(readable: Readable) -> None:
    baton = readable.baton
    assert baton.take_over()
    assert not baton.sleep(0) and not baton.take() and not baton.take_over()
    readable.far.send(b"y")
    assert not baton.sleep(0)
    baton.give()
    assert baton.sleep(0)


def test_a_receiver_thread_that_woke_too_late_is_woken_again(readable: Readable) -> None:
    baton = readable.baton
    assert baton.sleep(0)
    assert baton.take_over(), "another thread was faster"
    assert not baton.take()
    assert not baton.sleep(0)
    baton.give()
    assert baton.sleep(0) and baton.take()
    baton.give()


def test_without_epoll_the_receiver_thread_alone_reads() -> None:
    readable = Readable(selectors.PollSelector)
    assert not readable.baton.can_change_hands
    assert readable.baton.sleep(None) and not readable.baton.take_over()
    assert readable.baton.take()
    readable.baton.give()
    readable.close()


def test_nobody_reads_after_the_end() -> None:
    readable = Readable(selectors.EpollSelector)
    readable.close()
    assert not readable.baton.take_over() and not readable.baton.take()
