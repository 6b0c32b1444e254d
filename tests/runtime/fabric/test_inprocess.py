"""What only the in-process fabric has: workers that die at a chosen point."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from runtime.fabric.inprocess import InProcessFabric
from runtime.fabric.interface import CONTROL, EndpointClosed, Tag

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

WAIT = 20
TAG = Tag(0, 0, 0, "forward")


@pytest.fixture
def network(inprocess_network: Any) -> Any:
    return inprocess_network


def test_every_call_of_a_killed_worker_raises(network: Any) -> None:
    a, b = network.add(0), network.add(1)
    a.send(1, TAG)
    b.send(0, TAG)
    waiting = network.run(lambda: b.receive(0, TAG._replace(index=1)))
    network.fabric.kill(1)
    with pytest.raises(EndpointClosed):
        waiting.result(WAIT)
    for call in (
        b.check,
        b.acknowledge,
        lambda: b.connect({}),
        lambda: b.send(0, TAG),
        lambda: b.send(0, TAG, background=True),
        lambda: b.send(0, TAG._replace(what=CONTROL)),
        lambda: b.receive(0, TAG),
        lambda: b.receive_any([TAG]),
        lambda: b.poll_any([TAG]),
    ):
        with pytest.raises(EndpointClosed):
            call()
    assert network.lost[0].get(timeout=WAIT) == (1, "died")
    assert a.receive(1, TAG).sender == 1  # sent before the end
    a.send(1, TAG)  # vanishes
    assert network.lost[1].empty()


def test_background_sends_of_a_killed_worker_never_leave(network: Any) -> None:
    holding, release = threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        holding.set()
        release.wait(WAIT)

    a, b = network.add(0), network.add(1, on_control=hold)
    a.send(1, TAG._replace(what=CONTROL))  # holds b's thread before its background sends
    assert holding.wait(WAIT)
    b.send(0, TAG, [torch.ones(3)], background=True)
    network.fabric.kill(1)
    release.set()
    b._thread.join(WAIT)
    assert not b._thread.is_alive() and a.poll_any([TAG]) is None


def test_only_those_who_knew_it_are_told_and_once(network: Any) -> None:
    endpoints = [network.add(worker) for worker in range(4)]
    endpoints[0].send(3, TAG)
    endpoints[3].send(1, TAG._replace(what=CONTROL))
    network.fabric.kill(3, "was shot")
    network.fabric.kill(3)
    endpoints[3].close()
    for worker in (0, 1):
        assert network.lost[worker].get(timeout=WAIT) == (3, "was shot")
    for worker in range(3):
        endpoints[worker].close()
        assert network.lost[worker].empty()


def test_ids_are_never_used_twice() -> None:
    fabric = InProcessFabric()
    fabric.endpoint(0)
    fabric.kill(0)
    with pytest.raises(AssertionError):
        fabric.endpoint(0)
