"""What links carry is measured once, told, and what a search goes by."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from actors.gauge import LONG_BYTES, Gauge, peer_of
from actors.line import Line
from actors.planning import searched_planners
from actors.worker import Worker
from runtime.checkpoint import ShardFile
from runtime.fabric.inprocess import InProcessFabric
from runtime.fabric.interface import CONTROL, Endpoint, Message, Tag
from runtime.fabric.sockets import SocketEndpoint
from runtime.plan import CONTROLLER, Member, Plan, Shard, Stage
from runtime.protocol import Echo, Echoed, Here, Interrupt, Leave, Linked, Resume, Written
from runtime.speeds import Speeds
from strategies.profile import Profile
from strategies.search.space import Space
from tests.strategies.search.test_planning import LAYERS, LAYOUT
from tests.support.cluster import toy_job
from tests.support.sockets import WAIT

MESSAGE, BYTE = 2**-10, 2**-27
"""Seconds that the network takes, there and back. Sums of them are exact."""

SECRET = b"a secret of the job's own"


def plan_of(*workers: int) -> Plan:
    return Plan(1, (Stage(0, 1, workers),), ((workers[0],),), (Shard(0, 0, 64, workers[0], None),))


class Network:
    """Two workers on a fabric whose time passes with what is sent on it, and only so."""

    def __init__(self, sockets: bool) -> None:
        self.now, self.seconds_per_byte = 0.0, BYTE
        self.told: queue.SimpleQueue[Linked] = queue.SimpleQueue()
        self.echoes = 0
        self.fabric = InProcessFabric()
        self.gauges = [Gauge(worker, lambda: self.now) for worker in (0, 1)]
        make: Callable[..., Endpoint] = (
            partial(SocketEndpoint, secret=SECRET) if sockets else self.fabric.endpoint
        )
        self.endpoints = [make(worker, on_control=partial(self._control, worker)) for worker in (0, 1)]

    def _control(self, worker: int, message: Message) -> None:
        match message.note:
            case Echo():
                self.echoes += 1
                self.now += MESSAGE + self.seconds_per_byte * sum(each.nbytes for each in message.tensors)
                self.gauges[worker].answer(self.endpoints[worker], message.sender, message.note)
            case Echoed():
                self.gauges[worker].answered(message.note)

    def begin(self, *workers: int) -> None:
        """Begins at worker 0 and returns when it has measured; worker 1 is not told of it."""
        before = set(threading.enumerate())
        addresses = {worker: self.endpoints[worker].address for worker in workers}
        self.gauges[0].begin(self.endpoints[0], plan_of(*workers), addresses, self.told.put)
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith("gauge"):
                thread.join(WAIT)

    def close(self) -> None:
        for endpoint in self.endpoints:
            endpoint.close()


@pytest.fixture(params=[False, True], ids=["in-process", "sockets"])
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    found = Network(request.param)
    yield found
    found.close()


def test_a_link_is_measured_once_even_to_one_that_was_not_told_of_it(network: Network) -> None:
    network.begin(0)
    assert network.echoes == 0, "who is alone has nothing to measure"
    network.begin(0, 1)
    linked = network.told.get(timeout=WAIT)
    assert (linked.worker, linked.peer) == (0, 1)
    assert linked.seconds_per_message == MESSAGE / 2
    assert linked.bytes_per_second == 1 / BYTE
    sent, sizes = network.echoes, network.endpoints[0].statistics()["bytes_sent"]
    assert sizes <= 4 * LONG_BYTES + 8192  # what the messages are wrapped in
    network.begin(0, 1)
    assert network.echoes == sent


@pytest.mark.parametrize("seconds_per_byte", [0.0, -BYTE / 1024], ids=["equal", "shorter"])
def test_what_cannot_be_told_apart_is_tried_again(network: Network, seconds_per_byte: float) -> None:
    network.seconds_per_byte = seconds_per_byte
    network.begin(0, 1)
    assert network.echoes > 0 and network.told.empty()
    network.seconds_per_byte = BYTE
    network.gauges[0].answered(Echoed(0))  # one of the first try's, late
    network.begin(0, 1)
    assert network.told.get(timeout=WAIT).bytes_per_second == 1 / BYTE


def test_links_between_hosts_are_measured_where_there_are_any() -> None:
    workers = tuple(range(8))
    apart = {worker: f"10.0.0.{worker // 4}:{40000 + worker}" for worker in workers}
    assert [peer_of(worker, workers, apart) for worker in workers] == [4, 5, 6, 7, 0, 1, 2, 3]
    mixed = {worker: f"[fd00::{worker % 3}]:{40000 + worker}" for worker in workers}
    peers = [peer_of(worker, workers, mixed) for worker in workers]
    assert all(worker % 3 != peer % 3 for worker, peer in zip(workers, peers, strict=True))
    one = {worker: f"127.0.0.1:{40000 + worker}" for worker in workers}
    assert [peer_of(worker, workers, one) for worker in workers] == [1, 2, 3, 4, 5, 6, 7, 0]


def test_a_command_that_is_overtaken_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Plan] = []
    monkeypatch.setattr(Gauge, "begin", lambda gauge, endpoint, plan, *rest: begun.append(plan))
    fabric = InProcessFabric()
    controller = fabric.endpoint(CONTROLLER, on_control=lambda message: None)
    worker = Worker(
        0,
        toy_job(tmp_path, search=Space(stages=(1,))),
        lambda on_control, on_lost: fabric.endpoint(0, on_control=on_control, on_lost=on_lost),
        torch.device("cpu"),
    )
    # of somebody else's work, so that there is nothing to do but to serve what others need
    resume = Resume(plan_of(1), 0, "initial", {}, (), None, 1)
    overtaken = replace(resume, plan=replace(resume.plan, generation=2))
    newer = replace(resume, plan=replace(resume.plan, generation=3))
    tag = Tag(0, 0, 0, CONTROL)
    worker.endpoint.interrupt(3)
    for command in (Interrupt(3, ()), overtaken, newer):
        controller.send(0, tag, note=command)
    running = threading.Thread(target=worker.run)
    running.start()
    try:
        while not begun:
            assert running.is_alive()
            threading.Event().wait(0.001)
    finally:
        controller.send(0, tag, note=Leave("done"))
        running.join(WAIT)
        fabric.close()
    assert [plan.generation for plan in begun] == [3]


def test_a_controller_that_comes_after_a_checkpoint_is_told_of_the_link() -> None:
    fabric = InProcessFabric()
    heard: queue.SimpleQueue[object] = queue.SimpleQueue()
    second = fabric.endpoint(-2, on_control=lambda message: heard.put(message.note))
    line = Line(0, CONTROLLER)
    fabric.endpoint(CONTROLLER)
    line.endpoint = fabric.endpoint(0)
    linked = Linked(0, 1, 1e-4, 1e9)
    written = [Written(0, 1, version, None, ShardFile("f", "0" * 64, 0, ())) for version in (2, 4)]
    line.linked(linked)
    for each in written:
        line.tell_surely(each, only=True)
    line.attach(-2, second.address)
    here = Here(0, line.endpoint.address, "", (1.0,), (2.0,), 1)
    line.introduce(here, ())
    assert [heard.get(timeout=WAIT) for _ in range(3)] == [here, linked, written[1]]
    fabric.close()


def test_the_search_goes_by_what_was_measured(tmp_path: Path) -> None:
    space = Space(schedules=("1f1b",))
    job = toy_job(tmp_path, search=space, micro_batches=6, link_bytes_per_second=1e3)
    seconds, halves = (0.01,) * LAYERS, ((0.005, 0.005),) * LAYERS
    profile = Profile(seconds, seconds, (8,) * LAYERS, None, (8,) * LAYERS, halves)
    choose, _ = searched_planners(LAYOUT, profile, job, space)
    members = [Member(worker, f"node{worker}") for worker in range(6)]
    speeds = Speeds()
    assumed = choose(0, members, speeds, None)
    speeds.link(Linked(0, 1, 1e-4, 1e9))
    speeds.link(Linked(1, 0, 2e-4, 3e9))
    assert (speeds.bytes_per_second, speeds.seconds_per_message) == (1e9, 2e-4), "noise is not averaged in"
    measured = choose(1, members, speeds, None)
    # where links are slow nobody shares gradients; where not, six micro-batches are done side by side
    assert len(assumed.groups) == 6 and len(measured.groups) == 1
