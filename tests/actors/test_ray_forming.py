"""Who of the first workers is waited for, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from actors import forming
from actors.forming import bring, nodes_may_come

pytestmark = pytest.mark.ray

ROOM = 2


@ray.remote(num_cpus=1)
class Started:
    def __init__(self, *, ill: bool = False) -> None:
        if ill:
            raise RuntimeError("no such file")

    def start(self, problem: Exception | None) -> str:
        if problem is not None:
            raise problem
        return "ready"


class Crew:
    """Actors that are placed where there is room, as workers are."""

    def __init__(self, ill: int | None = None, problem: Exception | None = None) -> None:
        self._ill, self._problem = ill, problem
        self.actors: list[Any] = []
        self.answers: list[Any] = []

    def create(self, worker: int) -> Any:
        self.actors.append(Started.remote(ill=worker == self._ill))
        self.answers.append(self.actors[-1].start.remote(self._problem))
        return self.answers[-1]

    def ready(self) -> int:
        return len(ray.wait(self.answers, num_returns=len(self.answers), timeout=0)[0])


@pytest.fixture(scope="module")
def small_ray() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=ROOM, include_dashboard=False, logging_level="ERROR", log_to_driver=False
    )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def impatient(small_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forming, "START_SECONDS", 0.0)


def brought(crew: Crew, workers: range, least: int, **settings: Any) -> forming.FirstWorkers:
    try:
        return bring(crew, workers, least, **{"stopped": lambda: False, **settings})  # type: ignore[arg-type]
    finally:
        for actor in crew.actors:
            ray.kill(actor)


def test_who_has_no_place_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forming, "START_SECONDS", 60.0)
    crew, looks = Crew(), iter([False] * 2 * ROOM)
    # a few looks more than it takes to see that all who have room are ready
    found = brought(crew, range(4, 7), 1, stopped=lambda: crew.ready() == ROOM and next(looks, True))
    assert set(found.ready.values()) == {"ready"} and not found.lost
    assert len(found.ready) == ROOM and len(found.starting) == 1
    assert {*found.ready, *found.starting} == {4, 5, 6}


def test_without_an_autoscaler_there_is_an_end_to_waiting() -> None:
    assert not nodes_may_come()
    found = brought(Crew(), range(ROOM + 1), ROOM + 1)
    assert found.starting and not found.lost


def test_where_nodes_may_come_the_least_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def may_come() -> bool:
        asked.append(True)
        return len(asked) < 4

    monkeypatch.setattr(forming, "nodes_may_come", may_come)
    monkeypatch.setattr(forming, "LOOK_SECONDS", 0.05)
    assert brought(Crew(), range(ROOM + 1), ROOM + 1).starting
    assert len(asked) == 4, "as long as nodes might still come"


def test_who_died_is_lost_and_who_raised_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forming, "START_SECONDS", 60.0)
    found = brought(Crew(ill=1), range(ROOM), 1)
    assert list(found.ready) == [0] and list(found.lost) == [1]
    with pytest.raises(ValueError, match="no such column"):
        brought(Crew(problem=ValueError("no such column")), range(1), 1)
    with pytest.raises(ValueError, match="worker 0 could not start"):
        brought(Crew(problem=RuntimeError("why")), range(1), 1)
