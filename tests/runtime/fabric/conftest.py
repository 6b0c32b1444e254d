"""Networks of endpoints, the same way over sockets and in one process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from runtime.fabric.inprocess import InProcessFabric
from runtime.fabric.interface import Endpoint, Message
from runtime.fabric.sockets import SocketEndpoint

SECRET = b"a secret of the job's own"


class Network:
    """Endpoints of one kind, and what their callbacks were told."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.fabric = InProcessFabric()
        self.endpoints: dict[int, Endpoint] = {}
        self.control: dict[int, queue.SimpleQueue[Message]] = {}
        self.lost: dict[int, queue.SimpleQueue[tuple[int, str]]] = {}
        self.threads: list[threading.Thread] = []

    def add(self, worker: int, on_control: Callable[[Message], None] | None = None, **options: Any) -> Any:
        self.control[worker] = queue.SimpleQueue()
        self.lost[worker] = queue.SimpleQueue()
        on_control = on_control or self.control[worker].put
        on_lost = lambda *what: self.lost[worker].put(what)  # noqa: E731
        endpoint: Any
        if self.kind == "sockets":
            endpoint = SocketEndpoint(worker, SECRET, on_control=on_control, on_lost=on_lost, **options)
        else:
            endpoint = self.fabric.endpoint(worker, on_control=on_control, on_lost=on_lost)
        self.endpoints[worker] = endpoint
        addresses = {w: e.address for w, e in self.endpoints.items()}
        for other in self.endpoints.values():
            other.connect(addresses)
        return endpoint

    def run(self, work: Callable[[], Any]) -> Future[Any]:
        """Runs in a thread; whatever it raises comes out of the future."""
        future: Future[Any] = Future()

        def target() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        self.threads.append(thread)
        return future

    def close(self) -> None:
        for endpoint in self.endpoints.values():
            endpoint.close()
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive(), "a call outlived its endpoint"


@pytest.fixture(params=["sockets", "in-process"])
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    network = Network(request.param)
    yield network
    network.close()


@pytest.fixture
def socket_network() -> Iterator[Network]:
    network = Network("sockets")
    yield network
    network.close()


@pytest.fixture
def inprocess_network() -> Iterator[Network]:
    network = Network("in-process")
    yield network
    network.close()
