"""How many workers are asked for, and when."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.hiring import FIRST_PAUSE, LONGEST_PAUSE, Hiring
from runtime.signals import Hire


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
