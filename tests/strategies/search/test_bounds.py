"""What is said of a combination without looking at its cuts is no more than the best of them takes."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations as subsets

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.search.bounds import Bounds
from strategies.search.cost import Problem, evaluate
from strategies.search.dynamic import CutSearch
from strategies.search.memory import SHARDINGS
from strategies.search.search import leanest, search_within
from strategies.search.shortest import NEVER
from strategies.search.space import Combination, Space, combinations
from strategies.sequence.sharing import Sharing
from tests.strategies.search.test_search import ALIKE, ROWS, cost_model, cuts

EVERYTHING = Space(shardings=tuple(SHARDINGS), sequences=(1, 2), offloads=(None, (2, 1)))


def best(
    problem: Problem,
    space: Space,
    combination: Combination,
    limit: int | None,
    lengths: tuple[int, int] = (1, 99),
) -> float:
    """The least step of all cuts whose first stage has so many layers and of all sets of recomputed layers
    that fit; infinite where none does."""
    layers = range(problem.layers)
    every = [again for count in range(problem.layers + 1) for again in subsets(layers, count)]
    costs = (
        evaluate(problem, combination, bounds, again)
        for bounds in cuts(problem.layers, combination.stages)
        if lengths[0] <= bounds[1] <= lengths[1]
        for again in (every if space.recompute is None else [space.recompute])
    )
    return min((c.step_seconds for c in costs if limit is None or c.memory_bytes <= limit), default=NEVER)


@given(
    rows=ROWS,
    alike=st.booleans(),
    workers=st.integers(1, 5),
    micro_batches=st.integers(1, 9),
    limit=st.one_of(st.none(), st.integers(500, 20_000)),
    fixed=st.booleans(),
    host_state=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_no_cut_takes_less_than_its_bound(
    rows: list[tuple[int, int, int, int, int]],
    alike: bool,
    workers: int,
    micro_batches: int,
    limit: int | None,
    fixed: bool,
    host_state: bool,
) -> None:
    rows = [rows[0]] * 4 if alike else rows[:4]
    sharing = (Sharing(heads=3, head_share=0.5, exchanges=2, exchanged_bytes=100),) * len(rows)
    costs = replace(cost_model(rows), sharing=sharing, host_state=host_state)
    problem, space = Problem(costs, micro_batches, speed=0.8), replace(EVERYTHING, recompute=None)
    if fixed:
        space = replace(space, recompute=(0,))
    possible = list(combinations(space, workers, problem.layers, micro_batches))
    search = CutSearch(problem, limit, space.recompute)
    exact = [best(problem, space, each, limit) for each in possible]
    for factor in (NEVER, 1.5, 1.1, 1.001):  # also where no more than so many seconds are of interest
        enough = factor * min(exact)
        for combination, bound, least in zip(possible, search.least(possible, enough), exact, strict=True):
            assert bound <= least * (1 + 1e-12) or least >= enough, (combination, bound, least)


@given(
    rows=ROWS,
    ends=st.booleans(),
    workers=st.integers(2, 5),
    micro_batches=st.integers(1, 9),
    limit=st.integers(500, 20_000),
    lengths=st.sampled_from([(1, 1), (2, 2), (1, 2), (2, 3)]),
)
@settings(max_examples=40, deadline=None)
def test_nor_where_the_first_stage_has_so_many_layers(
    rows: list[tuple[int, int, int, int, int]],
    ends: bool,
    workers: int,
    micro_batches: int,
    limit: int,
    lengths: tuple[int, int],
) -> None:
    """Also of equal layers between two that differ."""
    rows = [rows[0], *[(5, 9, 20, 50, 400)] * 3, rows[-1]] if ends else rows
    problem = Problem(cost_model(rows), micro_batches)
    space = Space(schedules=("zero-bubble", "1f1b"), shardings=("zero1", "zero3"))
    possible = [
        each
        for each in combinations(space, workers, problem.layers, micro_batches)
        if 1 < each.stages <= problem.layers - lengths[1] + 1
    ]
    bounds = Bounds(problem, limit, None)
    exact = [best(problem, space, each, limit, lengths) for each in possible]
    for factor in (NEVER, 1.5, 1.001):
        enough = factor * min(exact, default=NEVER)
        found = bounds.least([(each, lengths) for each in possible], enough)
        for combination, bound, least in zip(possible, found, exact, strict=True):
            assert bound <= least * (1 + 1e-12) or least >= enough, (combination, bound, least)
            if least < enough < NEVER:
                within = bounds.windows.first_lengths(combination, enough)
                assert best(problem, space, combination, limit, within) <= least


@given(
    rows=ROWS,
    workers=st.integers(1, 4),
    micro_batches=st.integers(1, 9),
    schedules=st.sampled_from([Space().schedules, ("zero-bubble",), ("gpipe", "zero-bubble")]),
    fixed=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_nothing_fits_less_than_the_leanest_and_something_fits_that(
    rows: list[tuple[int, int, int, int, int]],
    workers: int,
    micro_batches: int,
    schedules: tuple[str, ...],
    fixed: bool,
) -> None:
    problem = Problem(cost_model(rows[: 4 if fixed else 3]), micro_batches)
    space = replace(EVERYTHING, sequences=(1,), schedules=schedules, recompute=(0,) if fixed else None)
    every = [again for count in range(4) for again in subsets(range(problem.layers), count)]
    least = min(
        evaluate(problem, combination, bounds, again).memory_bytes
        for combination in combinations(space, workers, problem.layers, micro_batches)
        for bounds in cuts(problem.layers, combination.stages)
        for again in ([space.recompute] if space.recompute is not None else every)
    )
    assert leanest(problem, space, workers) == least
    assert not search_within(problem, space, workers, least - 1)
    assert search_within(problem, space, workers, least)


@pytest.mark.parametrize(("limit", "close"), [(None, 1e-12), (1_600, 1e-12), (1_150, 0.03), (900, 0.03)])
def test_of_layers_that_are_alike_the_bound_is_what_the_best_takes_or_little_less(
    limit: int | None, close: float
) -> None:
    problem = Problem(cost_model(ALIKE[:4]), 8)
    space = Space(stages=(2,), schedules=("1f1b", "gpipe"), shardings=("zero1", "zero3"))
    possible = list(combinations(space, 4, problem.layers, 8))
    bounds = CutSearch(problem, limit).least(possible)
    exact = [best(problem, space, each, limit) for each in possible]
    assert len(possible) == 4 and min(exact) < NEVER
    assert bounds == pytest.approx(exact, rel=close)


def test_what_cannot_fit_is_said_without_looking_at_cuts() -> None:
    problem = Problem(cost_model(ALIKE), 8)
    possible = list(combinations(Space(), 4, problem.layers, 8))
    assert set(CutSearch(problem, 400).least(possible)) == {NEVER}
    assert NEVER not in CutSearch(problem, 1 << 40).least(possible)
