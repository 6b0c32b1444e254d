"""Threads that read for themselves while they wait: what the others notice of it, which is nothing."""

from __future__ import annotations

import random
import selectors
import threading
from typing import Any

import pytest
import torch

from runtime.fabric import strangers
from runtime.fabric.interface import CONTROL, EndpointClosed, Interrupted, Message, Tag
from tests.support.sockets import WAIT, call, is_dropped, until

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def tag(what: str = "forward", index: int = 0) -> Tag:
    return Tag(0, 0, 0, what, index)


def reader(endpoint: Any) -> int | None:
    """The thread that reads, if one does."""
    holder: int | None = endpoint._receiver._baton.holder
    return holder


def start_waiting(network: Any, endpoint: Any, sender: int, wanted: Tag) -> Any:
    """A future of ``receive`` in a thread that has begun to read. Nothing may have come before, or the
    receiver thread may be reading it just then, and this thread leave the reading to it."""
    future = network.run(lambda: endpoint.receive(sender, wanted))
    until(lambda: reader(endpoint) == network.threads[-1].ident)
    return future


def test_a_thread_that_waits_reads_its_own_message_and_handles_control(socket_network: Any) -> None:
    handled_by: list[int] = []
    a = socket_network.add(0)
    b = socket_network.add(1, on_control=lambda _: handled_by.append(threading.get_ident()))
    waiting = start_waiting(socket_network, b, 0, tag())
    a.send(1, tag(what=CONTROL))
    until(lambda: len(handled_by) == 1)
    a.send(1, tag(), note="this")
    assert waiting.result(WAIT).note == "this"
    a.send(1, tag(what=CONTROL))  # nobody waits any more
    until(lambda: len(handled_by) == 2)
    assert handled_by == [socket_network.threads[-1].ident, b._receiver.thread.ident]


def test_when_the_reader_has_what_it_wants_the_others_still_get_theirs(socket_network: Any) -> None:
    a, b = socket_network.add(0), socket_network.add(1)
    first = start_waiting(socket_network, b, 0, tag(index=0))
    others = [socket_network.run(lambda k=k: b.receive(0, tag(index=k)).note) for k in (1, 2)]
    until(lambda: len(b._inbox._waiters) == 3)
    for index in (1, 0, 2):
        a.send(1, tag(index=index), note=index)
    assert first.result(WAIT).note == 0
    assert [other.result(WAIT) for other in others] == [1, 2]


def test_a_reader_is_woken_by_what_comes_from_its_own_process(socket_network: Any) -> None:
    first, second, third = (socket_network.add(worker) for worker in range(3))
    waits = [start_waiting(socket_network, e, e.worker, tag()) for e in (first, second, third)]
    first.send(0, tag(), note="from here")
    assert waits[0].result(WAIT).note == "from here"
    second.interrupt(1)
    with pytest.raises(Interrupted):
        waits[1].result(WAIT)
    third.close()
    with pytest.raises(EndpointClosed):
        waits[2].result(WAIT)


def test_a_callback_may_send_and_close_in_the_thread_that_waits(socket_network: Any) -> None:
    b: Any = None

    def answer_and_close(message: Message) -> None:
        b.send(0, tag(what=CONTROL), note="a farewell")
        b.close()

    a = socket_network.add(0)
    b = socket_network.add(1, on_control=answer_and_close)
    waiting = start_waiting(socket_network, b, 0, tag())
    a.send(1, tag(what=CONTROL))
    with pytest.raises(EndpointClosed):
        waiting.result(WAIT)
    assert socket_network.lost[0].get(timeout=WAIT)[0] == 1
    b._receiver.thread.join(WAIT)
    assert not b._receiver.thread.is_alive()


def test_a_stranger_that_a_waiting_thread_let_in_is_dropped_in_time(
    socket_network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strangers, "HANDSHAKE_SECONDS", 0.2)
    a, b = socket_network.add(0), socket_network.add(1)
    waiting = start_waiting(socket_network, b, 0, tag())
    with call(b) as silent:
        a.send(1, tag())  # over a connection that is accepted after the silent one
        waiting.result(WAIT)
        assert is_dropped(silent)


def test_ctrl_c_in_a_thread_that_reads_ends_one_link_and_no_other(socket_network: Any) -> None:
    def press(message: Message) -> None:
        raise KeyboardInterrupt

    a, b, c = socket_network.add(0), socket_network.add(1, on_control=press), socket_network.add(2)
    waiting = start_waiting(socket_network, b, 2, tag())
    a.send(1, tag(what=CONTROL))
    with pytest.raises(KeyboardInterrupt):
        waiting.result(WAIT)
    assert socket_network.lost[1].get(timeout=WAIT)[0] == 0
    c.send(1, tag(), note="fine")
    assert b.receive(2, tag()).note == "fine"


def test_what_a_thread_in_inference_mode_waits_for_is_an_ordinary_tensor(socket_network: Any) -> None:
    a, b = socket_network.add(0), socket_network.add(1)

    def wait() -> Message:
        with torch.inference_mode():
            message: Message = b.receive(0, tag())
            return message

    waiting = socket_network.run(wait)
    until(lambda: bool(b._inbox._waiters))
    a.send(1, tag(), [torch.ones(3)])
    assert not waiting.result(WAIT).tensors[0].is_inference()


def test_bulk_for_others_does_not_keep_a_thread_that_has_its_message(socket_network: Any) -> None:
    a, b, c = (socket_network.add(worker) for worker in range(3))
    x = torch.arange(1 << 20, dtype=torch.float32)

    def flood() -> None:
        for k in range(20):
            a.send(1, tag("bulk", k), [x + k])

    sending = socket_network.run(flood)
    for k in range(20):
        c.send(1, tag(index=k), note=k)
        assert b.receive(2, tag(index=k)).note == k
    sending.result(WAIT)
    assert all(torch.equal(b.receive(0, tag("bulk", k)).tensors[0], x + k) for k in range(20))


@pytest.mark.parametrize("selector", [selectors.DefaultSelector, selectors.PollSelector])
def test_many_threads_wait_read_and_answer_at_once(
    socket_network: Any, monkeypatch: pytest.MonkeyPatch, selector: type[selectors.BaseSelector]
) -> None:
    """A wake-up that gets lost would leave somebody waiting for ever."""
    monkeypatch.setattr(selectors, "DefaultSelector", selector)
    a, b = socket_network.add(0), socket_network.add(1)
    rounds, threads = 60, 4

    def play(endpoint: Any, other: int, thread: int, serves: bool) -> list[Any]:
        source = random.Random(thread)
        notes = []
        for k in range(rounds):
            here = tag(f"ball {thread}", k)
            if serves:
                endpoint.send(other, here, [torch.full((source.choice((1, 5, 40_000)),), k)])
            message = endpoint.receive(other, here)
            notes.append((len(message.tensors[0]), int(message.tensors[0][-1])))
            if not serves:
                endpoint.send(other, here, message.tensors)
            if k % 10 == thread:
                endpoint.send(other, tag(what=CONTROL), note=k)
        return notes

    games = [
        socket_network.run(lambda e=e, o=o, t=t, s=s: play(e, o, t, s))
        for t in range(threads)
        for e, o, s in ((a, 1, True), (b, 0, False))
    ]
    results = [game.result(WAIT) for game in games]
    for thread in range(threads):
        source = random.Random(thread)
        expected = [(source.choice((1, 5, 40_000)), k) for k in range(rounds)]
        assert results[2 * thread] == results[2 * thread + 1] == expected
    for worker in (0, 1):
        heard = [socket_network.control[worker].get(timeout=WAIT).note for _ in range(rounds // 10 * threads)]
        assert sorted(heard) == sorted(10 * tens + thread for tens in range(6) for thread in range(threads))


def test_a_stranger_is_dropped_while_somebody_waits(socket_network: Any) -> None:
    a, b = socket_network.add(0), socket_network.add(1)
    waiting = start_waiting(socket_network, b, 0, tag())
    with call(b) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n" + b"x" * 100)
        assert is_dropped(stranger)
    a.send(1, tag(), note="fine")
    assert waiting.result(WAIT).note == "fine"
