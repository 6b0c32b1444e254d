"""Which nodes a run's workers have left."""

from __future__ import annotations

from typing import Any

from actors.crew import RayCrew


def crew(domains: dict[int, str], *gone: int) -> RayCrew:
    nothing: Any = None
    made = RayCrew("run", nothing, nothing, nothing, -1, "at", nothing, nothing, nothing)
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
