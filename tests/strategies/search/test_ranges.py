"""Ranges that are alike are one, and those that are not are none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.search.cost import Problem
from strategies.search.ranges import LayerRanges, ranges_of
from tests.strategies.search.test_search import ROW, cost_model


@given(
    kinds=st.lists(ROW, min_size=2, max_size=2),
    order=st.lists(st.booleans(), min_size=1, max_size=9),
    again=st.sampled_from([None, (0,)]),
)
@settings(max_examples=60, deadline=None)
def test_each_range_has_its_own_sums_and_shares_them_with_what_is_alike(
    kinds: list[tuple[int, int, int, int, int]], order: list[bool], again: tuple[int, ...] | None
) -> None:
    rows = [kinds[each] for each in order]
    problem = Problem(cost_model(rows), 4)
    ranges = LayerRanges(problem, again)
    found: dict[object, int] = {}
    for first in range(len(rows)):
        for stop in range(first + 1, len(rows) + 1):
            place = int(ranges.places_FS[first, stop]) - 1
            forward, inputs, weights = (each[place] for each in ranges.whole_R)
            own = rows[first:stop]
            assert forward == pytest.approx(sum(row[0] for row in own) / 1024)
            assert inputs + weights == pytest.approx(sum(row[1] for row in own) / 1024)
            assert ranges.parameters_R[place] == sum(row[2] for row in own)
            assert ranges.largest_R[place] == max(row[4] for row in own)
            kept = problem.input_bytes(first) + sum(row[3] + row[4] for row in own)
            assert ranges.kept_R[place] == kept
            assert ranges.crossing_R[place] == problem.crossing_seconds(first)
            settled = again is not None and first == 0
            assert ranges.settled_R[place] == (problem.again[0] if settled else 0.0)
            into = problem.input_bytes(first), problem.crossing_seconds(first)
            like = tuple(own), into, settled
            assert found.setdefault(like, place) == place
    assert len(set(found.values())) == len(found) == len(ranges.span_R)


def test_they_are_worked_out_once() -> None:
    problem = Problem(cost_model([(4, 8, 10, 8, 100)] * 4), 4)
    assert ranges_of(problem, None) is ranges_of(problem, None)
    assert ranges_of(problem, None) is not ranges_of(problem, (0,))
