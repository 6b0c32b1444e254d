"""Which nodes a run's workers have left, and who could not be asked for."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from actors.crew import RayCrew
from runtime.signals import Input, Lost


def crew(domains: dict[int, str], *gone: int, post: Any = None, asked_for: Any = None) -> RayCrew:
    nothing: Any = None
    made = RayCrew("run", nothing, nothing, nothing, -1, "at", post, nothing, asked_for)
    made.domains.update(domains)
    made._gone.update(gone)
    return made


def test_a_node_is_emptied_when_nobody_is_left_on_it() -> None:
    assert crew({0: "a", 1: "b", 2: "b"}).emptied() == frozenset()
    assert crew({0: "a", 1: "b", 2: "b"}, 1).emptied() == frozenset()
    assert crew({0: "a", 1: "b", 2: "b"}, 1, 2).emptied() == {"b"}


def test_a_node_that_somebody_has_come_back_to_is_not() -> None:
    assert crew({0: "a", 1: "b", 3: "b"}, 1).emptied() == frozenset()


def test_nothing_is_left_where_there_is_nowhere_to_go() -> None:
    assert crew({0: "a", 1: "b"}, 0, 1).emptied() == frozenset()
    assert crew({}).emptied() == frozenset()


def test_a_worker_that_ray_cannot_be_asked_for_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would count as on its way for ever, and nobody would be asked for in its place."""
    posted: queue.SimpleQueue[Input] = queue.SimpleQueue()
    hiring = crew({}, post=posted.put, asked_for=lambda worker: None)

    def refused(worker: int) -> Any:
        raise ValueError("the actor's arguments are too large")

    monkeypatch.setattr(hiring, "_create", refused)
    hiring.hire(7)
    assert posted.get(timeout=10.0) == Lost(7, "could not start: the actor's arguments are too large")
