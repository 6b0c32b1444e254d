"""How many workers are asked for, and when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.controller import Controller
from runtime.events import DemandCapped, RunStarted, WorkerLost
from runtime.hiring import FIRST_PAUSE, LONGEST_PAUSE, Hiring
from runtime.protocol import Change, Settled
from runtime.signals import Hire, Lost, Resize, Terms, Tick
from tests.support.controlled import LAYOUT, Run, choose, notes, of, sent


def test_as_many_as_are_missing_and_no_more() -> None:
    hiring = Hiring(wanted=4, next_worker=2)
    assert hiring.orders(2, 0.0) == [Hire(2), Hire(3)]
    assert hiring.orders(2, 0.0) == []
    hiring.arrived(2)
    assert hiring.orders(3, 0.0) == []
    assert hiring.orders(2, 0.0) == [Hire(4)]


def test_nobody_is_asked_for_where_none_is_wanted() -> None:
    assert Hiring(wanted=0, next_worker=3).orders(1, 0.0) == []


def test_failures_to_start_are_retried_ever_more_slowly() -> None:
    hiring, now = Hiring(wanted=1, next_worker=0), 0.0
    for worker, pause in enumerate([FIRST_PAUSE, 2.0, 4.0, 8.0, *[LONGEST_PAUSE] * 4]):
        assert hiring.orders(0, now) == [Hire(worker)]
        hiring.lost(worker, now)
        assert hiring.orders(0, now + pause - 0.01) == []
        now += pause
    assert hiring.orders(0, now) == [Hire(8)]
    hiring.arrived(8)
    assert hiring.orders(0, now) == [Hire(9)]
    hiring.lost(9, now)
    assert hiring.orders(0, now + FIRST_PAUSE) == [Hire(10)], "a success begins the count anew"


@given(st.lists(st.sampled_from(["arrive", "fail", "die", "wait"]), max_size=40))
def test_ids_are_never_used_twice(story: list[str]) -> None:
    hiring, now, ready, asked = Hiring(wanted=3, next_worker=5), 0.0, 0, []
    starting: list[int] = []
    for event in story:
        orders = [hire.worker for hire in hiring.orders(ready, now)]
        asked += orders
        starting += orders
        assert ready + len(starting) <= 3
        if event == "arrive" and starting:
            hiring.arrived(starting.pop())
            ready += 1
        elif event == "fail" and starting:
            hiring.lost(starting.pop(), now)
        elif event == "die" and ready:
            hiring.lost(-7, now)  # of a worker that had arrived
            ready -= 1
        else:
            now += LONGEST_PAUSE
    assert asked == list(range(5, 5 + len(asked)))


def test_no_more_are_asked_for_than_are_of_use() -> None:
    run = Run(2)
    run.controller = Controller(Terms("r", LAYOUT, 9, 2, 1, max_workers=6, useful=3, spares=1), choose)
    outputs = run.join(0, 1)
    assert [hire.worker for hire in of(outputs, Hire)] == [2, 3], "three, and a spare"
    assert notes(outputs, DemandCapped) == [DemandCapped(0, 3, 6)]
    outputs = run.tell(Resize(5))
    assert [hire.worker for hire in of(outputs, Hire)] == [4, 5], "a person is taken at their word"


def test_where_all_are_of_use_nothing_is_said() -> None:
    run = Run(1)
    run.controller = Controller(Terms("r", LAYOUT, 9, 1, 1, max_workers=3, useful=3), choose)
    outputs = run.join(0)
    assert [hire.worker for hire in of(outputs, Hire)] == [1, 2] and not notes(outputs, DemandCapped)


def test_a_first_worker_without_a_place_is_no_loss_and_joins_later() -> None:
    run = Run(3)
    run.controller = Controller(Terms("r", LAYOUT, 9, 3, 1, max_workers=3, starting=(1, 2)), choose)
    outputs = run.join(0)
    assert [started.workers for started in notes(outputs, RunStarted)] == [1]
    assert not of(outputs, Hire) and not notes(outputs, WorkerLost), "they are on their way already"
    assert run.tell(Settled(0, 1)) == []
    assert set(sent(run.join(2), Change)) == {0, 2}
    lost = run.tell(Lost(1, "could not start: the node went"))
    assert not of(lost, Hire), "the next try waits a little"
    assert [hire.worker for hire in of(run.tell(Tick()), Hire)] == [3]


def test_a_first_worker_that_could_not_start_is_not_waited_for() -> None:
    run = Run(2)
    run.controller = Controller(Terms("r", LAYOUT, 9, 2, 1, starting=(1,)), choose)
    assert not notes(run.tell(Lost(1, "could not start")), RunStarted)
    assert [started.workers for started in notes(run.join(0), RunStarted)] == [1]
