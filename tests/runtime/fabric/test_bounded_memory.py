"""Inboxes over TCP hold no more than they may: senders are held back, and nothing stands still for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.fabric.interface import CONTROL, Interrupted, Tag
from tests.support.sockets import WAIT, until

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

MB = 1 << 20


def tag(generation: int = 0, what: str = "forward", index: Any = 0) -> Tag:
    return Tag(generation, 0, 0, what, index)


def test_a_full_inbox_holds_the_sender_back_but_not_control(socket_network: Any) -> None:
    a, b = socket_network.add(0), socket_network.add(1, inbox_limit_bytes=4 * MB)
    x = torch.arange(MB // 4)

    def flood() -> None:
        for k in range(128):  # more than the kernel's buffers and the inbox hold together
            a.send(1, tag(index=k), [x.float() + k])

    sending = socket_network.run(flood)
    until(lambda: bool(b._receiver._paused))
    a.send(1, tag(what=CONTROL), note="urgent")
    assert socket_network.control[1].get(timeout=WAIT).note == "urgent"
    assert not sending.done()
    for k in range(128):
        assert torch.equal(b.receive(0, tag(index=k)).tensors[0], x.float() + k)
    sending.result(WAIT)
    statistics = b.statistics()
    assert statistics["inbox_bytes"] == 0
    assert 4 * MB <= statistics["inbox_peak_bytes"] < 5 * MB


def test_the_end_of_a_held_back_peer_is_seen(socket_network: Any) -> None:
    a, b = socket_network.add(0), socket_network.add(1, inbox_limit_bytes=MB)
    sending = socket_network.run(lambda: [a.send(1, tag(index=k), [torch.ones(MB)]) for k in range(32)])
    until(lambda: bool(b._receiver._paused))
    a.close()
    with pytest.raises(Exception, match="closed"):
        sending.result(WAIT)
    assert socket_network.lost[1].get(timeout=WAIT)[0] == 0


def test_the_gate_opens_for_a_message_that_is_behind(socket_network: Any) -> None:
    a, b = socket_network.add(0), socket_network.add(1, inbox_limit_bytes=MB)
    sending = socket_network.run(
        lambda: [a.send(1, tag(index=k), [torch.full((MB // 4,), k)]) for k in range(100)]
    )
    until(lambda: bool(b._receiver._paused))
    for k in reversed(range(100)):
        assert b.receive(0, tag(index=k)).tensors[0][0] == k
    sending.result(WAIT)


def test_the_gate_opens_for_a_poll(socket_network: Any) -> None:
    a, b = socket_network.add(0), socket_network.add(1, inbox_limit_bytes=MB)

    def send() -> None:
        for k in range(100):
            a.send(1, tag(what="backup", index=k), [torch.full((MB // 4,), k)])
        a.send(1, tag(what="forward"), note="behind them all")

    sending = socket_network.run(send)
    until(lambda: bool(b._receiver._paused))
    found: list[str] = []

    def poll() -> bool:
        message = b.poll_any([tag(what="forward")])
        found.extend([message.note] if message else [])
        return bool(found)

    until(poll)
    assert found == ["behind them all"]
    sending.result(WAIT)


def test_two_that_flood_each_other_do_not_deadlock(socket_network: Any) -> None:
    a, b = (socket_network.add(w, inbox_limit_bytes=MB) for w in (0, 1))

    def flood_then_receive(endpoint: Any, peer: int) -> float:
        for k in range(24):  # 96 MB
            endpoint.send(peer, tag(index=k), [torch.ones(MB)])
        return sum(float(endpoint.receive(peer, tag(index=k)).tensors[0].sum()) for k in range(24))

    sides = [socket_network.run(lambda x=x, to=to: flood_then_receive(x, to)) for x, to in ((a, 1), (b, 0))]
    assert [side.result(WAIT) for side in sides] == [24 * MB] * 2


def test_an_interrupt_frees_a_send_to_a_lost_peer(socket_network: Any) -> None:
    a, b = socket_network.add(0), socket_network.add(1, inbox_limit_bytes=MB)
    done: list[int] = []

    def flood() -> None:
        for k in range(64):
            a.send(1, tag(index=k), [torch.ones(MB // 2)])
            done.append(k)

    sending = socket_network.run(flood)
    until(lambda: bool(b._receiver._paused))
    until(lambda: a._inbox._blocked > 0)
    a.interrupt(1, [1])
    with pytest.raises(Interrupted):
        sending.result(WAIT)
    assert len(done) < 64
    a.acknowledge()
    a.send(1, tag(1))  # vanishes
    b.interrupt(1, [0])


def test_a_send_to_a_live_peer_ends_whole_when_interrupted(socket_network: Any) -> None:
    a, b = socket_network.add(0), socket_network.add(1, inbox_limit_bytes=MB)
    x = torch.ones(16 * MB)  # 64 MB: it cannot leave before it is read
    a.send(1, tag(), [torch.ones(MB)])
    sending = socket_network.run(lambda: a.send(1, tag(index=1), [x]))
    until(lambda: bool(b._receiver._paused) and a._inbox._blocked > 0)
    a.interrupt(1)
    assert a.acknowledge() == 1
    b.interrupt(1)
    b.acknowledge()
    sending.result(WAIT)
    a.send(1, tag(1), note="the stream is whole")
    assert b.receive(0, tag(1)).note == "the stream is whole"
    assert b.statistics()["inbox_bytes"] == 0
