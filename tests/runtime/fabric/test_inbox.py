"""The inbox against a model: a plain list of messages."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from runtime.fabric.inbox import Inbox
from runtime.fabric.interface import Message, Tag

tags = st.builds(
    Tag, st.integers(0, 3), st.just(0), st.just(0), st.sampled_from("ab"), st.tuples(st.integers(0, 2))
)
deliveries = st.tuples(st.just("deliver"), st.integers(0, 2), tags, st.integers(0, 9))
polls = st.tuples(st.just("poll"), st.lists(st.sampled_from("ab"), min_size=1, max_size=2))
interrupts = st.tuples(st.just("interrupt"), st.integers(0, 3), st.sets(st.integers(0, 2), max_size=1))


@given(st.lists(deliveries | polls | interrupts, max_size=60))
def test_the_inbox_is_a_list_that_is_searched_and_purged(actions: list[Any]) -> None:
    inbox = Inbox(limit_bytes=30)
    model: list[tuple[int, Tag, int, int]] = []  # sender, tag, size, serial number
    generation = 0
    for serial, (action, *arguments) in enumerate(actions):
        if action == "deliver":
            sender, tag, size = arguments
            inbox.reserve(size)
            inbox.deliver(Message(sender, tag, note=serial), size)
            if tag.generation >= generation:
                model.append((sender, tag, size, serial))
        elif action == "poll":
            message = inbox.poll_any([Tag(generation, 0, 0, what) for what in arguments[0]])
            matches = [
                (arguments[0].index(tag.what), tag.index, sender, number, k)
                for k, (sender, tag, _, number) in enumerate(model)
                if tag.generation == generation and tag.what in arguments[0]
            ]
            assert (message is None) == (not matches)
            if message is not None:
                assert message.note == min(matches)[3]
                del model[min(matches)[4]]
        else:
            new, lost = arguments
            inbox.interrupt(new, lost)
            if new >= generation:
                generation = new
                model = [m for m in model if m[1].generation >= generation and m[0] not in lost]
            assert inbox.acknowledge() == generation
        assert inbox.bytes == sum(m[2] for m in model) <= inbox.peak_bytes


def test_room_is_announced_when_the_inbox_drains_and_when_somebody_blocks() -> None:
    announced: list[bool] = []
    inbox = Inbox(limit_bytes=10, on_room=lambda: announced.append(inbox.full()))
    tag = Tag(0, 0, 0, "a")
    for index in range(2):
        inbox.reserve(10)
        inbox.deliver(Message(0, tag._replace(index=index)), 10)
    assert inbox.full() and announced == []
    with inbox.blocked():
        assert not inbox.full()
    assert inbox.full() and announced == [False]
    assert inbox.poll_any([tag._replace(what="b")]) is None
    assert not inbox.full() and announced == [False, False]
    inbox.reserve(5)
    inbox.deliver(Message(0, tag._replace(what="b")), 5)
    assert inbox.full()
    inbox.take(0, tag)
    assert inbox.full() and len(announced) == 2
    inbox.take(0, tag._replace(index=1))
    assert not inbox.full() and announced == [False, False, False]
