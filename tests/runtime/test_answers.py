"""How long a worker may take to say what it holds."""

from __future__ import annotations

from runtime.control.state import Phase
from runtime.events import WorkerLost
from runtime.protocol import Beat
from runtime.signals import Lost, Tick
from tests.support.controlled import Run, notes

BEAT_SECONDS = 0.2


def lost_in(run: Run, seconds: float, computing: dict[int, float]) -> list[int]:
    """Who is given up in so many seconds, in which worker w tells that it computes for ``computing[w]`` (0.0:
    it does not) and gives no other sign than that it lives."""
    found: list[int] = []
    for _ in range(round(seconds / BEAT_SECONDS)):
        run.now += BEAT_SECONDS
        for worker, since in computing.items():
            run.controller.handle(Beat(worker, 5, since), run.now)
        found += [event.worker for event in notes(run.controller.handle(Tick(), run.now), WorkerLost)]
    return found


def interrupted() -> tuple[Run, float]:
    """Of three workers one is lost, and the others owe an answer; how many seconds they have for it."""
    run = Run().form()
    run.tell(Lost(2, "died"))
    assert run.controller.phase is Phase.AGREEING
    return run, run.controller.terms.patience.stuck_seconds


def test_who_waits_and_does_not_answer_is_given_up() -> None:
    run, patience = interrupted()
    assert lost_in(run, patience - 1, {0: 0.0, 1: 0.0}) == []
    assert lost_in(run, 2.0, {0: 0.0, 1: 0.0}) == [0, 1]


def test_who_is_in_a_call_comes_out_of_it_first_and_then_has_as_long() -> None:
    run, patience = interrupted()
    assert lost_in(run, 4 * patience, {0: 0.001, 1: 0.001}) == []
    assert lost_in(run, patience - 1, {0: 0.0, 1: 0.001}) == []
    assert lost_in(run, 2.0, {0: 0.0, 1: 0.001}) == [0]


def test_who_is_stuck_in_a_call_is_given_up_all_the_same() -> None:
    run, patience = interrupted()
    assert lost_in(run, 1.0, {0: patience + 1, 1: 0.001}) == [0]
