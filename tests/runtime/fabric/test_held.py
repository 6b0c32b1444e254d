"""A peer that reads nothing (its process is stopped) and those that report to it all the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from runtime.fabric.interface import CONTROL, Message, Tag
from runtime.fabric.sockets import SocketEndpoint
from tests.support.sockets import WAIT, until

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

SECRET = b"a secret of the job's own"
TAG = Tag(0, 0, 0, CONTROL)
REPORTS = 30_000
"""Of 1 KB: three times what the buffers of both sides take where the kernel is generous."""


def _child(connection: Any, parent: str) -> None:
    """Worker 9: tells which reports have come as soon as the last one is there."""
    heard: list[int] = []
    last = threading.Event()

    def hear(message: Message) -> None:
        heard.append(message.note["number"])
        if heard[-1] == REPORTS:
            last.set()

    endpoint = SocketEndpoint(9, SECRET, on_control=hear)
    endpoint.connect({0: parent})
    connection.send(endpoint.address)
    last.wait()
    connection.send(heard)
    last.clear()
    last.wait()


@contextmanager
def stopped(parent: SocketEndpoint) -> Iterator[tuple[int, Any]]:
    """A child's process id and what it says; there is a link to it, and it is stopped."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, parent.address), daemon=True)
    child.start()
    try:
        parent.connect({9: ours.recv()})
        report(parent, 0)
        until(lambda: parent.statistics()["messages_sent"] == 1)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
        yield child.pid, ours
    finally:
        child.kill()
        child.join()


def report(parent: SocketEndpoint, number: int, **how: bool) -> None:
    parent.send(9, TAG, note={"number": number, "text": "x" * 1000}, **how)


def report_all(parent: SocketEndpoint) -> None:
    for number in range(1, REPORTS):
        report(parent, number)
    for _ in range(100):
        report(parent, -1, fleeting=True)
    report(parent, REPORTS)


@pytest.mark.parametrize("end", ["it wakes up", "it dies", "it is left"])
def test_who_reports_does_not_wait(socket_network: Any, end: str) -> None:
    parent = socket_network.add(0)
    with stopped(parent) as (child, says):
        with ThreadPoolExecutor(1) as pool:
            try:
                pool.submit(report_all, parent).result(WAIT)
            finally:  # else a thread that waits would be waited for
                if end != "it is left":
                    os.kill(child, signal.SIGCONT if end == "it wakes up" else signal.SIGKILL)
        if end == "it wakes up":
            assert says.poll(WAIT)
            assert says.recv() == list(range(REPORTS + 1)), "all in order, but those of use only then"
        elif end == "it dies":
            assert socket_network.lost[0].get(timeout=WAIT)[0] == 9
        else:
            parent.close()


def test_what_is_held_has_a_bound(socket_network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.fabric.links.HELD_LIMIT_BYTES", 1 << 20)
    parent = socket_network.add(0)
    with stopped(parent):
        for number in range(1, REPORTS):
            report(parent, number)
        peer, reason = socket_network.lost[0].get(timeout=WAIT)
        assert peer == 9 and "reads nothing" in reason
        report(parent, REPORTS)  # vanishes
