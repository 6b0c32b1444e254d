"""What can travel as a note, and that bytes can become nothing else."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, get_args

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.fabric import notes
from runtime.plan import Plan, Shard, Stage, Strategy
from runtime.protocol import Command, Entry, Greeting, Held, Report, Resume
from runtime.salvage import Status
from strategies.share import Share

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=99)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.integers() | st.text(), inner, max_size=4)
        | st.frozensets(st.integers() | st.text(), max_size=4)
        | st.sets(st.integers(), max_size=4)
    ),
    max_leaves=20,
)


@dataclass(frozen=True)
class Stranger:
    value: int


class Colour(Enum):
    RED = 1


@given(VALUES)
def test_plain_values_come_as_they_went(value: Any) -> None:
    found = notes.loads(notes.dumps(value))
    assert found == value and repr(type(found)) == repr(type(value))


@given(st.lists(SCALARS, max_size=4))
def test_a_list_arrives_as_a_tuple(value: list[Any]) -> None:
    assert notes.loads(notes.dumps(value)) == tuple(value)


def plan(generation: int = 1) -> Plan:
    return Plan(
        generation, (Stage(0, 2, (0, 1)),), ((0, 1),), (Shard(0, 0, 64, 0, 1), Shard(0, 64, 128, 1, 0))
    )


def test_a_plan_comes_without_what_was_worked_out_from_it() -> None:
    sent = plan()
    assert sent.workers == (0, 1)
    found = notes.loads(notes.dumps(sent))
    fields = {"generation", "stages", "assignment", "shards", "keeping", "teams", "paths", "strategy"}
    assert found == sent and set(vars(found)) == fields


def test_a_plans_strategy_arrives_with_it() -> None:
    sent = replace(plan(), strategy=Strategy("zero-bubble", recompute=(0, 2)))
    assert notes.loads(notes.dumps(sent)) == sent


def test_a_plan_that_went_to_another_is_not_mixed_up() -> None:
    sent = [plan(1), plan(2), plan(1)]
    encoded = [notes.dumps(Resume(p, 0, "initial", {}, (), None, 5)) for p in sent for _ in range(2)]
    assert [notes.loads(data).plan for data in encoded] == [p for p in sent for _ in range(2)]


def test_messages_of_the_protocol_are_carried() -> None:
    held = Held(3, 2, (), {0: 5}, {5: (1, 2)}, {5: 0.25})
    for sent in (held, Entry(3, None, None), Greeting(7), Status.DONE, (Status.FORWARD, held)):
        assert notes.loads(notes.dumps(sent)) == sent
    for cls in (*get_args(Command), *get_args(Report)):
        assert notes._classes[cls.__name__] is cls


def test_a_share_keeps_its_bits() -> None:
    maxima_T = np.array([0.1, np.inf, 5e-324])
    sent = Share(
        losses={3: (0.1 + 0.2, 7)}, maxima_T=maxima_T, squared={0: 3**200, 1: -(2**64)}, fingerprint=2**64 - 1
    )
    found = notes.loads(notes.dumps(sent))
    assert found.maxima_T.tobytes() == maxima_T.tobytes() and found.maxima_T.flags.writeable
    assert (found.losses, found.squared, found.fingerprint) == (sent.losses, sent.squared, sent.fingerprint)


@pytest.mark.parametrize("value", [Stranger(1), Colour.RED, object(), print, [Stranger(1)], np.array(["a"])])
def test_what_nobody_named_is_not_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="a note cannot hold"):
        notes.dumps(value)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a note ran code",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Bomb()),
        b"",
        b"\xc1",
        msgpack.packb(msgpack.ExtType(99, b"")),
        msgpack.packb(msgpack.ExtType(0, notes.dumps(("Popen", ("touch", "x"))))),
        msgpack.packb(msgpack.ExtType(0, notes.dumps(("Greeting",)))),
        msgpack.packb(msgpack.ExtType(0, notes.dumps(()))),
        msgpack.packb(msgpack.ExtType(1, notes.dumps(("Status", "__class__")))),
        msgpack.packb(msgpack.ExtType(4, notes.dumps(("|O", (1,), b"12345678")))),
        msgpack.packb(msgpack.ExtType(4, notes.dumps(("<f8", (3,), b"12345678")))),
    ],
)
def test_bytes_that_are_no_note_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        notes.loads(data)


def test_depth_has_an_end() -> None:
    data = msgpack.packb(1)
    for _ in range(3000):
        data = msgpack.packb(msgpack.ExtType(0, data))
    with pytest.raises(ValueError):
        notes.loads(data)


@given(st.binary(max_size=200))
def test_noise_is_a_value_or_refused(data: bytes) -> None:
    try:
        notes.loads(data)
    except ValueError:
        return
