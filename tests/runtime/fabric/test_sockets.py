"""What only TCP has: strangers, dead processes, torn streams. ``test_bounded_memory`` has full buffers."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import struct
import threading
from typing import Any

import pytest
import torch

from runtime.fabric import framing, handshake, notes, strangers
from runtime.fabric.handshake import Lane, Refused
from runtime.fabric.interface import CONTROL, Tag
from runtime.fabric.sockets import SocketEndpoint
from tests.support.sockets import WAIT, call, is_dropped

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

SECRET = b"a secret of the job's own"
MB = 1 << 20


def tag(generation: int = 0, what: str = "forward", index: Any = 0) -> Tag:
    return Tag(generation, 0, 0, what, index)


# Strangers.


class Exploit:
    """Unpickling this is noticed."""

    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Exploit, "ran", True))


STRANGERS = {
    "garbage": os.urandom(500),
    "a web browser": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"x" * 100,
    "an oversized header": struct.pack("!IQ", 2**32 - 1, 2**63) * 20,
    "a pickle": struct.pack("!IQ", 90, 0) + pickle.dumps(Exploit()) * 5,
    "another worker's hello": struct.pack("!8sBqq32s", b"reknit01", 1, 1, 99, b"n" * 32),
    "a proof of nothing": struct.pack("!8sBqq32s", b"reknit01", 1, 1, 0, b"n" * 32) + b"p" * 32,
    "an unknown lane": struct.pack("!8sBqq32s", b"reknit01", 77, 1, 0, b"n" * 32),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_dropped_without_harm(socket_network: Any, name: str) -> None:
    a, b = socket_network.add(0), socket_network.add(1)
    with call(a) as stranger:
        stranger.sendall(STRANGERS[name])
        assert is_dropped(stranger)
    b.send(0, tag(), note="fine")
    assert a.receive(1, tag()).note == "fine"
    assert not Exploit.ran and socket_network.lost[0].empty()


def test_a_silent_stranger_is_dropped_and_holds_up_nobody(
    socket_network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strangers, "HANDSHAKE_SECONDS", 0.2)
    a, b = socket_network.add(0), socket_network.add(1)
    with call(a) as silent, call(a) as half:
        half.sendall(b"reknit01")
        b.send(0, tag(), note="meanwhile")
        assert a.receive(1, tag()).note == "meanwhile"
        assert is_dropped(silent) and is_dropped(half)


def test_too_many_strangers_cost_the_oldest_its_place(
    socket_network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strangers, "_MAX_STRANGERS", 2)
    a, b = socket_network.add(0), socket_network.add(1)
    with call(a) as oldest, call(a), call(a):
        assert is_dropped(oldest)
        b.send(0, tag(), note="fine")
        assert a.receive(1, tag()).note == "fine"


def test_another_secret_is_refused_by_both_sides(socket_network: Any) -> None:
    a = socket_network.add(0)
    told: list[tuple[int, str]] = []
    done = threading.Event()

    def on_lost(peer: int, reason: str) -> None:
        told.append((peer, reason))
        done.set()

    impostor = SocketEndpoint(1, b"quite another secret", on_lost=on_lost)
    impostor.connect({0: a.address})
    impostor.send(0, tag(), [torch.ones(3)])  # vanishes
    assert done.wait(WAIT) and told == [(0, "does not know the job's secret")]
    assert a.statistics()["bytes_received"] == 0 and socket_network.lost[0].empty()
    impostor.close()


def test_a_proof_cannot_be_reflected(socket_network: Any) -> None:
    a = socket_network.add(0)
    hello = struct.pack("!8sBqq32s", b"reknit01", 1, 1, 0, b"n" * 32)
    with call(a) as stranger:
        stranger.sendall(hello)
        reply = stranger.recv(64, socket.MSG_WAITALL)
        stranger.sendall(reply[32:])
        assert is_dropped(stranger)


def test_a_listener_without_the_secret_is_not_spoken_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialler = socket.create_connection(listener.getsockname(), timeout=WAIT)
        other, _ = listener.accept()
        other.sendall(b"x" * 64)
        with dialler, other, pytest.raises(Refused):
            handshake.dial(dialler, SECRET, 0, 1, Lane.MAIN)


def test_mistakes_in_the_settings_are_named() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        SocketEndpoint(0, b"short")
    with pytest.raises(ValueError, match="advertise"):
        SocketEndpoint(0, SECRET, host="0.0.0.0")
    endpoint = SocketEndpoint(0, SECRET, host="0.0.0.0", advertise="10.0.0.3")
    assert endpoint.address.startswith("10.0.0.3:")
    endpoint.close()


def test_a_note_that_is_too_large_is_the_callers_mistake(
    socket_network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framing, "MAX_HEADER_BYTES", 1000)
    a, b = socket_network.add(0), socket_network.add(1)
    with pytest.raises(ValueError, match="as tensors"):
        a.send(1, tag(), note=b"x" * 1000)
    a.send(1, tag(), note="small")
    assert b.receive(0, tag()).note == "small"


# A peer that knows the secret and breaks.


def join_as(worker: int, endpoint: SocketEndpoint, lane: Lane = Lane.MAIN) -> socket.socket:
    sock = call(endpoint)
    handshake.dial(sock, SECRET, worker, endpoint.worker, lane)
    return sock


PICKLE = pickle.dumps(Exploit())
HEADER = notes.dumps((tuple(tag()), None, [("float32", (1000,))]))
BROKEN = {
    "torn in the prefix": (b"\0\0", "closed the connection"),
    "torn in a tensor": (struct.pack("!IQ", len(HEADER), 4000) + HEADER + b"x" * 1000, "closed"),
    "an oversized header": (struct.pack("!IQ", 2**32 - 1, 0), "unusable"),
    "sizes that disagree": (struct.pack("!IQ", len(HEADER), 9) + HEADER, "unusable"),
    "a pickle": (struct.pack("!IQ", len(PICKLE), 0) + PICKLE, "unusable"),
    "no note": (struct.pack("!IQ", 20, 9) + b"?" * 20, "unusable"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_stream_ends_that_link_only(socket_network: Any, name: str) -> None:
    a, b = socket_network.add(0), socket_network.add(1)
    data, reason = BROKEN[name]
    with join_as(7, a) as broken:
        broken.sendall(data)
        broken.shutdown(socket.SHUT_WR)
        peer, why = socket_network.lost[0].get(timeout=WAIT)
    assert peer == 7 and reason in why and not Exploit.ran
    b.send(0, tag(), note="fine")
    assert a.receive(1, tag()).note == "fine"
    assert a.statistics()["inbox_bytes"] == 0


def test_a_message_in_the_smallest_pieces(socket_network: Any) -> None:
    a = socket_network.add(0)
    x = torch.arange(100, dtype=torch.float32)
    data = framing.encode_head(tag(), [x, x], "note") + bytes(framing.as_bytes(x)) * 2
    with join_as(7, a) as sock:
        for k in range(len(data)):
            sock.sendall(data[k : k + 1])
        sock.sendall(data * 3)
        for _ in range(4):
            message = a.receive(7, tag())
            assert all(torch.equal(t, x) for t in message.tensors) and message.note == "note"


def test_a_peer_that_nobody_can_reach_is_lost(socket_network: Any) -> None:
    a = socket_network.add(0)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    a.connect({5: f"127.0.0.1:{port}"})
    a.send(5, tag())
    peer, reason = socket_network.lost[0].get(timeout=WAIT)
    assert peer == 5 and "cannot be reached" in reason
    a.send(5, tag())
    a.close()
    assert socket_network.lost[0].empty()


def test_an_interrupt_ends_the_dialling_of_a_lost_peer(socket_network: Any) -> None:
    a = socket_network.add(0)
    with socket.create_server(("127.0.0.1", 0)) as hung:  # the kernel accepts, nobody answers
        a.connect({5: f"127.0.0.1:{hung.getsockname()[1]}"})
        sending = socket_network.run(lambda: a.send(5, tag()))
        accepted, _ = hung.accept()
        assert accepted.recv(89)
        a.interrupt(1, [5])
        sending.result(WAIT)
        accepted.close()
    assert socket_network.lost[0].empty()


# Death of a process.


def _child(connection: Any, parents: dict[int, str]) -> None:
    """Worker 9: dials 0 and 1, is dialled by 1 and 2, then waits to be killed."""
    endpoint = SocketEndpoint(9, SECRET)
    endpoint.connect(parents)
    for parent in (0, 1):
        endpoint.send(parent, tag(), note="hello")
    connection.send(endpoint.address)
    endpoint.receive(1, tag())
    endpoint.receive(2, tag())
    connection.send("linked")
    endpoint.receive(0, tag(what="never"))


def test_sigkill_is_seen_on_dialled_and_on_accepted_links(socket_network: Any) -> None:
    parents = [socket_network.add(worker) for worker in range(3)]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, {w: p.address for w, p in enumerate(parents)}))
    child.start()
    try:
        address = ours.recv()
        for parent in parents:
            parent.connect({9: address})
        for parent in (0, 1):
            assert parents[parent].receive(9, tag()).note == "hello"
        for parent in (1, 2):
            parents[parent].send(9, tag())
        assert ours.recv() == "linked"
        assert all(socket_network.lost[w].empty() for w in range(3))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        for worker in range(3):
            assert socket_network.lost[worker].get(timeout=WAIT)[0] == 9
        parents[0].send(9, tag())  # vanishes
        for worker, parent in enumerate(parents):
            parent.close()
            assert socket_network.lost[worker].empty(), "a loss is told once"
    finally:
        child.kill()
        child.join()


def test_a_forked_child_does_not_keep_links_alive(socket_network: Any) -> None:
    a, b = socket_network.add(0), socket_network.add(1)
    a.send(1, tag())
    b.receive(0, tag())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)  # until the parent closes its end
        os._exit(0)
    try:
        a.close()
        assert socket_network.lost[1].get(timeout=WAIT)[0] == 0
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


def test_no_thread_or_socket_is_left_behind() -> None:
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    for _ in range(3):
        endpoints = [SocketEndpoint(w, SECRET) for w in range(3)]
        for endpoint in endpoints:
            endpoint.connect({w: e.address for w, e in enumerate(endpoints)})
        for endpoint in endpoints:
            for to in range(3):
                endpoint.send(to, tag(), background=True)
                endpoint.send(to, tag(what=CONTROL), background=True)
                endpoint.receive(endpoint.worker, tag()) if to == endpoint.worker else None
        for endpoint in endpoints:
            endpoint.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
