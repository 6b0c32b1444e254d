"""Who hears whom, told to a controller that found nothing moving."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from actors.line import Line
from runtime.fabric.interface import CONTROL, Message, Tag
from runtime.fabric.sockets import SocketEndpoint
from runtime.plan import CONTROLLER, WorkerId
from runtime.protocol import Greeting, Heard, Probe
from runtime.pulse import Pulse
from tests.support.sockets import WAIT

SECRET = b"a secret of the job's own"
DEAF = 1
"""Takes connections and never says a word, as where packets are swallowed: dialling it takes ten seconds."""

SPEAKING = (0, 2, 3)
LISTENS_SECONDS = 3.0


class Peers:
    """Workers that have never spoken to each other, and the controller."""

    def __init__(self, stack: ExitStack) -> None:
        self.told: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        deaf = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0))))
        self.lines = {worker: Line(worker, CONTROLLER) for worker in SPEAKING}
        self.controller = self._endpoint(CONTROLLER, stack)
        self.endpoints = {worker: self._endpoint(worker, stack) for worker in SPEAKING}
        addresses = {worker: endpoint.address for worker, endpoint in self.endpoints.items()}
        addresses |= {DEAF: f"127.0.0.1:{deaf.getsockname()[1]}", CONTROLLER: self.controller.address}
        self.controller.connect(addresses)
        for worker, endpoint in self.endpoints.items():
            endpoint.connect(addresses)
            self.lines[worker].endpoint = endpoint

    def _endpoint(self, worker: WorkerId, stack: ExitStack) -> SocketEndpoint:
        def control(message: Message) -> None:
            match message.note:
                case Probe() as probe:
                    self.lines[worker].answer(probe)
                case Greeting() as greeting:
                    self.lines[worker].greeted(message.sender, greeting)
                case Heard() as heard:
                    self.told.put(heard)

        return stack.enter_context(closing(SocketEndpoint(worker, SECRET, on_control=control)))

    def probe(self, number: int, peers: tuple[WorkerId, ...], seconds: float) -> dict[WorkerId, Heard]:
        for worker in SPEAKING:
            self.controller.send(worker, Tag(0, 0, 0, CONTROL), note=Probe(number, peers, seconds))
        answers = [self.told.get(timeout=WAIT) for _ in SPEAKING]
        return {answer.worker: answer for answer in answers}


@pytest.fixture
def peers() -> Iterator[Peers]:
    with ExitStack() as stack:
        yield Peers(stack)


def test_nobody_is_accused_for_whom_another_one_cannot_reach(peers: Peers) -> None:
    found = peers.probe(1, (0, DEAF, 2, 3), LISTENS_SECONDS)
    assert {worker: set(heard.peers) for worker, heard in found.items()} == {0: {2, 3}, 2: {0, 3}, 3: {0, 2}}


def test_a_greeting_that_comes_too_late_is_forgotten(peers: Peers) -> None:
    line = peers.lines[0]
    peers.probe(1, SPEAKING, 0.1)
    line.greeted(2, Greeting(1))
    line.greeted(2, Greeting(2))
    assert set(line._heard) == {2}


def test_a_controller_that_is_on_its_way_is_waited_for_anew() -> None:
    class Patient(Line):
        """Hears four times, as often as it looks, that there will be one."""

        asked = 0

        def look(self) -> None:
            self.asked += 1
            if self.asked <= 4:
                self.wait_on()

    line = Patient(0, CONTROLLER)
    line.wait_on()
    assert line.is_open, "there is one already"
    line.broke()
    assert line.beat(Pulse(), threading.Event(), 0.1, 0.25, line.look), "none came"
    assert line.asked > 4
