"""What is at work stays unless something is better by enough, and nobody looks at what is far behind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.search.cost import Problem
from strategies.search.search import Present, search_within
from strategies.search.space import Space
from tests.strategies.search.test_search import ROWS, cost_model

SPACE = Space(schedules=("1f1b", "gpipe", "zero-bubble"), shardings=("zero1", "zero3"))
ALL = 1_000

CASES = {
    "rows": ROWS,
    "workers": st.integers(2, 6),
    "micro_batches": st.integers(1, 6),
    "limit": st.one_of(st.none(), st.integers(500, 20_000)),
    "share": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
}


@given(**CASES, place=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_the_present_strategy_stays_if_nothing_is_better_by_enough(
    rows: list[tuple[int, int, int, int, int]],
    workers: int,
    micro_batches: int,
    limit: int | None,
    share: float,
    place: int,
) -> None:
    problem = Problem(cost_model(rows), micro_batches)
    everything = search_within(problem, SPACE, workers, limit, most=ALL)
    if not everything:
        return
    at = everything[place % len(everything)]
    present = Present(at.strategy, len(at.sizes), share)
    found = search_within(problem, SPACE, workers, limit, present=present)
    alike = [each for each in everything if present.is_like(each.strategy, len(each.sizes))]
    here, best = alike[0].step_seconds, everything[0].step_seconds
    if abs(here / best / (1 + share) - 1) > 1e-9:  # neither is right on the border
        assert [found[0].step_seconds] == pytest.approx([here if here < best * (1 + share) else best])
    if here < best * (1 + share):
        assert len(found) == 1 and present.is_like(found[0].strategy, len(found[0].sizes))


def test_what_does_not_fit_does_not_stay() -> None:
    problem = Problem(cost_model([(4, 8, 40, 8, 100)] * 4), 4)
    everything = search_within(problem, SPACE, 4, None, most=ALL)
    fullest = max(everything, key=lambda each: each.memory_bytes)
    present = Present(fullest.strategy, len(fullest.sizes), 1e9)
    least = min(each.memory_bytes for each in everything)
    (found,) = search_within(problem, SPACE, 4, least, present=present)
    assert found.memory_bytes == least < fullest.memory_bytes


@given(**CASES)
@settings(max_examples=40, deadline=None)
def test_all_that_are_near_the_best_are_found_and_no_others(
    rows: list[tuple[int, int, int, int, int]],
    workers: int,
    micro_batches: int,
    limit: int | None,
    share: float,
) -> None:
    problem = Problem(cost_model(rows), micro_batches)
    everything = [p.step_seconds for p in search_within(problem, SPACE, workers, limit, most=ALL)]
    found = [p.step_seconds for p in search_within(problem, SPACE, workers, limit, most=ALL, near=share)]
    if everything:
        border = everything[0] * (1 + share)
        assert found == pytest.approx(everything[: len(found)])
        assert all(seconds <= border * (1 + 1e-9) for seconds in found)
        assert all(seconds >= border * (1 - 1e-9) for seconds in everything[len(found) :])
