"""What every endpoint must do, over sockets and in one process alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.fabric.interface import CONTROL, EndpointClosed, Interrupted, Message, Tag

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

WAIT = 20  # seconds until a test that hangs fails


def tag(generation: int = 0, what: str = "forward", index: Any = 0, step: int = 0) -> Tag:
    return Tag(generation, step, 0, what, index)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist())


TENSORS = {
    "float32": torch.randn(3, 5),
    "bfloat16": torch.randn(7).bfloat16(),
    "float64 with a nan": torch.tensor([float("nan"), -0.0, 1e-310], dtype=torch.float64),
    "int64": torch.arange(10),
    "bool": torch.tensor([True, False, True]),
    "complex64": torch.randn(4, dtype=torch.complex64),
    "conjugate": torch.randn(4, dtype=torch.complex64).conj(),
    "float8": torch.randn(16).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "transposed": torch.randn(6, 4).T,
    "strided": torch.randn(40)[3::7],
    "needs a gradient": torch.randn(3, requires_grad=True),
    "large": torch.randn(300_001),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_arrives_bit_for_bit(network: Any, name: str) -> None:
    a, b = network.add(0), network.add(1)
    sent = TENSORS[name]
    a.send(1, tag(), [sent, torch.arange(3)], note={"k": 1})
    message = b.receive(0, tag())
    got = message.tensors[0]
    assert (got.dtype, got.shape, got.requires_grad) == (sent.dtype, sent.shape, False)
    assert bits(got) == bits(sent.detach())
    assert message.tensors[1].tolist() == [0, 1, 2]
    assert (message.sender, message.tag, message.note) == (0, tag(), {"k": 1})


def test_hundreds_of_tensors_in_one_message(network: Any) -> None:
    a, b = network.add(0), network.add(1)
    tensors = [torch.full((k % 50,), k) for k in range(1500)]
    a.send(1, tag(), tensors)
    assert all(torch.equal(x, y) for x, y in zip(b.receive(0, tag()).tensors, tensors, strict=True))


def test_the_sender_may_overwrite_and_the_receiver_owns(network: Any) -> None:
    a, b = network.add(0), network.add(1)
    x, note = torch.ones(1000), [1]
    a.send(1, tag(index=1), [x], note)
    a.send(0, tag(index=1), [x])
    x.zero_()
    note.append(2)
    message = b.receive(0, tag(index=1))
    assert message.tensors[0].sum() == 1000 and message.note == (1,)
    message.tensors[0].fill_(7)
    assert a.receive(0, tag(index=1)).tensors[0].sum() == 1000


def test_equal_tags_come_in_the_order_they_were_sent(network: Any) -> None:
    a, b = network.add(0), network.add(1)
    for k in range(20):
        a.send(1, tag(), note=k)
    assert [b.receive(0, tag()).note for _ in range(20)] == list(range(20))


def test_receive_any_takes_the_earliest_tag_then_the_lowest_index(network: Any) -> None:
    a, b = network.add(0), network.add(1)
    for what, index in (("forward", 0), ("backward", 5), ("forward", 1), ("backward", 2), ("other", 0)):
        a.send(1, tag(what=what, index=index))
    b.receive(0, tag(what="other"))  # sent last on the same link, so all the others are there
    tags = [tag(what="backward"), tag(what="forward", index=99)]
    got = [b.receive_any(tags).tag for _ in range(2)] + [b.poll_any(tags).tag for _ in range(2)]
    assert [(t.what, t.index) for t in got] == [
        ("backward", 2),
        ("backward", 5),
        ("forward", 0),
        ("forward", 1),
    ]
    assert b.poll_any(tags) is None


def test_receive_any_does_not_care_who_sent(network: Any) -> None:
    a, b, c = network.add(0), network.add(1), network.add(2)
    for sender in (c, b):
        network.run(lambda sender=sender: sender.send(0, tag(index=(3, sender.worker))))
    senders = {a.receive_any([tag()]).sender for _ in range(2)}
    assert senders == {1, 2}


def test_a_waiting_receive_wakes_when_the_message_comes(network: Any) -> None:
    a, b = network.add(0), network.add(1)
    waiting = network.run(lambda: b.receive(0, tag(index=4)).note)
    a.send(1, tag(index=3), note="another")
    a.send(1, tag(index=4), note="this")
    assert waiting.result(WAIT) == "this"


def test_older_messages_are_dropped_and_newer_ones_wait(network: Any) -> None:
    a, b = network.add(0), network.add(1)
    b.interrupt(2)
    assert b.acknowledge() == 2 == b.generation
    a.send(1, tag(1), [torch.ones(100)], note="stale")
    a.send(1, tag(3), [torch.ones(10)], note="early")
    a.send(1, tag(2), note="now")
    assert b.receive(0, tag(2)).note == "now"
    assert b.statistics()["inbox_bytes"] == 40
    b.interrupt(3)
    b.acknowledge()
    assert b.receive(0, tag(3)).note == "early"
    assert b.statistics()["inbox_bytes"] == 0


def test_interrupt_wakes_waits_and_blocks_calls_until_acknowledged(network: Any) -> None:
    a, b = network.add(0), network.add(1)
    a.send(1, tag(), [torch.ones(5)])
    b.receive(0, tag())
    a.send(1, tag(index=1), [torch.ones(5)])
    waits = [network.run(lambda: b.receive(0, tag(index=9)))]
    waits += [network.run(lambda: b.receive_any([tag(what="never")]))]
    b.check()
    b.interrupt(1, ())
    for wait in waits:
        with pytest.raises(Interrupted) as error:
            wait.result(WAIT)
        assert error.value.generation == 1
    new = tag(1)
    for call in (
        b.check,
        lambda: b.receive(0, tag(index=1)),
        lambda: b.receive_any([new]),
        lambda: b.poll_any([new]),
        lambda: b.send(0, new),
    ):
        with pytest.raises(Interrupted):
            call()
    b.send(0, tag(what=CONTROL), note="control may always pass")
    assert network.control[0].get(timeout=WAIT).note == "control may always pass"
    assert b.acknowledge() == 1
    b.check()
    assert b.statistics()["inbox_bytes"] == 0
    with pytest.raises(Interrupted):
        b.receive(0, tag(0, index=1))
    with pytest.raises(Interrupted):
        b.send(0, tag(0))
    b.send(0, tag(0), background=True)  # dropped, since the generation ended
    a.send(1, new, note="on")
    assert b.receive(0, new).note == "on"


def test_old_and_repeated_interrupts_are_ignored(network: Any) -> None:
    a = network.add(0)
    a.interrupt(5)
    a.acknowledge()
    a.interrupt(5)
    a.interrupt(4)
    a.check()
    assert a.generation == 5
    a.interrupt(6)
    a.interrupt(7)
    assert a.acknowledge() == 7


def test_an_interrupt_from_the_control_callback(network: Any) -> None:
    worker: Any = None

    def obey(message: Message) -> None:
        worker.interrupt(message.note)
        worker.send(message.sender, tag(what=CONTROL), note="interrupted")

    worker = network.add(1, on_control=obey)
    controller = network.add(-1)
    waiting = network.run(lambda: worker.receive(-1, tag()))
    controller.send(1, tag(what=CONTROL), note=3)
    with pytest.raises(Interrupted):
        waiting.result(WAIT)
    assert network.control[-1].get(timeout=WAIT).note == "interrupted"
    assert worker.acknowledge() == 3


def test_control_passes_whatever_its_generation_and_to_oneself(network: Any) -> None:
    a, b = network.add(0), network.add(1)
    b.interrupt(9)
    a.send(1, tag(0, CONTROL), [torch.ones(2)], note="old")
    message = network.control[1].get(timeout=WAIT)
    assert message.note == "old" and message.tensors[0].tolist() == [1, 1]
    a.send(0, tag(0, CONTROL), note="self")
    assert network.control[0].get(timeout=WAIT).sender == 0


def test_a_failing_callback_harms_nobody(network: Any, caplog: pytest.LogCaptureFixture) -> None:
    got: list[Any] = []

    def fail_first(message: Message) -> None:
        got.append(message.note)
        if len(got) == 1:
            raise RuntimeError("a bug in the callback")
        b.send(0, tag(), note="still here")

    a, b = network.add(0), network.add(1, on_control=fail_first)
    a.send(1, tag(what=CONTROL), note=1)
    a.send(1, tag(what=CONTROL), note=2)
    assert a.receive(1, tag()).note == "still here"
    assert got == [1, 2] and "a bug in the callback" in caplog.text


def test_background_sends_arrive(network: Any) -> None:
    a, b = network.add(0), network.add(1)
    tensors = [torch.full((100_000,), float(k)) for k in range(8)]
    for k, tensor in enumerate(tensors):
        a.send(1, tag(what="backup", index=k), [tensor], background=True)
    for k in reversed(range(8)):
        assert torch.equal(b.receive(0, tag(what="backup", index=k)).tensors[0], tensors[k])


def test_a_fenced_peer_can_do_no_harm(network: Any) -> None:
    a, b, c = network.add(0), network.add(1), network.add(2)
    a.send(1, tag(), note="before")
    b.receive(0, tag())
    a.send(1, tag(1), [torch.ones(4)], note="ahead of its fencing")
    a.send(1, tag(what="last"))
    b.receive(0, tag(what="last"))
    b.interrupt(1, [0])
    b.acknowledge()
    assert b.statistics()["inbox_bytes"] == 0
    assert network.lost[0].get(timeout=WAIT)[0] == 1  # the fenced one sees that it was left
    a.send(1, tag(1), note="zombie")
    a.send(1, tag(1, CONTROL), note="zombie")
    b.send(0, tag(1), note="vanishes")
    c.send(1, tag(1), note="alive")
    c.send(1, tag(1, CONTROL), note="alive")
    assert b.receive_any([tag(1)]).note == "alive"
    assert network.control[1].get(timeout=WAIT).note == "alive"
    assert a.poll_any([tag(1)]) is None
    b.close()
    assert network.lost[1].empty() and network.control[1].empty()


def test_the_end_of_a_peer_is_told_once_and_after_its_farewell(network: Any) -> None:
    a, b, c = network.add(0), network.add(1), network.add(2)
    for x, y in ((a, b), (b, a)):
        for background in (False, True):
            x.send(y.worker, tag(), background=background)
            y.receive(x.worker, tag())
    told: list[str] = []
    a._on_lost = lambda peer, reason: told.append(f"lost {peer} {reason}")
    a._on_control = lambda message: told.append(message.note)
    b.send(0, tag(what=CONTROL), note="farewell")
    b.close()
    b.close()
    a.send(1, tag(), [torch.ones(10)])  # vanishes
    c.send(0, tag(index=1))
    a.receive(2, tag(index=1))
    watch = network.run(lambda: c.receive(0, tag(index=2)))
    while len(told) < 2:
        a.send(0, tag(index=3))
        a.receive(0, tag(index=3))
    a.send(2, tag(index=2))
    watch.result(WAIT)
    a.close()
    assert told == ["farewell", "lost 1 closed the connection"]


def test_close_wakes_and_refuses(network: Any) -> None:
    a = network.add(0)
    network.add(1)
    waits = [network.run(lambda: a.receive(1, tag())), network.run(lambda: a.receive_any([tag()]))]
    a.close()
    for wait in waits:
        with pytest.raises(EndpointClosed):
            wait.result(WAIT)
    for call in (
        a.check,
        a.acknowledge,
        lambda: a.send(1, tag()),
        lambda: a.send(1, tag(), background=True),
        lambda: a.send(1, tag(what=CONTROL)),
        lambda: a.receive(1, tag()),
        lambda: a.poll_any([tag()]),
    ):
        with pytest.raises(EndpointClosed):
            call()


def test_close_from_a_callback(network: Any) -> None:
    a = network.add(0)
    b: Any = network.add(1, on_control=lambda message: b.close())
    a.send(1, tag(what=CONTROL))
    assert network.lost[0].get(timeout=WAIT)[0] == 1


def test_an_unknown_peer_is_the_callers_mistake(network: Any) -> None:
    with pytest.raises(ValueError, match="worker 7"):
        network.add(0).send(7, tag())


def test_many_threads_at_once_lose_nothing(network: Any) -> None:
    endpoints = [network.add(worker) for worker in range(3)]
    per_thread = 60

    def send(me: int, to: int, thread: int) -> None:
        for k in range(per_thread):
            tensor = torch.full(((k * 997) % 5000,), me * 100 + thread)
            endpoints[me].send(to, tag(index=(thread, k)), [tensor], note=(me, k), background=thread == 1)

    def receive(me: int) -> int:
        total = 0
        for sender in range(3):
            for thread in range(2):
                for k in range(per_thread):
                    message = endpoints[me].receive(sender, tag(index=(thread, k)))
                    assert message.note == (sender, k)
                    assert (message.tensors[0] == sender * 100 + thread).all()
                    total += message.tensors[0].numel()
        return total

    futures = [network.run(lambda me=me: receive(me)) for me in range(3)]
    futures += [
        network.run(lambda me=me, to=to, t=t: send(me, to, t))
        for me in range(3)
        for to in range(3)
        for t in range(2)
    ]
    expected = 6 * sum((k * 997) % 5000 for k in range(per_thread))
    assert [f.result(60) for f in futures][:3] == [expected] * 3
    for endpoint in endpoints:
        statistics = endpoint.statistics()
        assert statistics["inbox_bytes"] == 0 < statistics["inbox_peak_bytes"]


def test_statistics_count(network: Any) -> None:
    a, b = network.add(0), network.add(1)
    for k in range(3):
        a.send(1, tag(index=k), [torch.ones(1000)])
    for k in range(3):
        b.receive(0, tag(index=k))
    sent, received = a.statistics(), b.statistics()
    assert sent["messages_sent"] == 3
    assert sent["bytes_sent"] >= 12_000 and received["bytes_received"] >= 12_000
    assert 4000 <= received["inbox_peak_bytes"] <= 12_000 and received["inbox_bytes"] == 0
