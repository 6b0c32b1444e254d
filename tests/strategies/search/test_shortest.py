"""Bounds of many paths at once are none's excess, and are reached where there is nothing to trade."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from strategies.search.shortest import NEVER, least_apart, least_sum_and_maximum

PLACES = 7
"""From the first layer to behind the last one."""

Tables = NDArray[np.float64]


def tables(seed: int, count: int) -> tuple[Tables, Tables]:
    """(added, beyond) of so many tables, [table, first, stop]: no empty stage, and some take too much."""
    random = np.random.default_rng(seed)
    added = random.integers(1, 9, (count, PLACES, PLACES)).astype(np.float64)
    beyond = random.integers(1, 9, (count, PLACES, PLACES)).astype(np.float64)
    barred = np.tril(np.ones((PLACES, PLACES), dtype=bool)) | (random.random((count, PLACES, PLACES)) < 0.1)
    added[barred] = beyond[barred] = NEVER
    return added, beyond


def exactly(added: Tables, beyond: Tables, row: list[int], ends: tuple[int, int]) -> float:
    """The least sum and maximum of one row whose first stage ends within ``ends``."""
    first_stops = slice(ends[0], ends[1] + 1)

    def cut(table: Tables, k: int) -> Tables:
        firsts = slice(0, 1) if k == 0 else first_stops if k == 1 else slice(None)
        stops = slice(-1, None) if k == len(row) - 1 else first_stops if k == 0 else slice(None)
        return table[firsts, stops]

    found = least_sum_and_maximum(
        [cut(added[place], k) for k, place in enumerate(row)],
        [cut(beyond[place], k) for k, place in enumerate(row)],
    )
    return NEVER if found is None else found[0]


@given(
    seed=st.integers(0, 10_000),
    rows=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=5), min_size=1, max_size=5),
    flat=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_no_path_of_any_row_takes_less_than_its_bound(seed: int, rows: list[list[int]], flat: bool) -> None:
    added, beyond = tables(seed, 4)
    if flat:  # nothing to trade: the least sum is the least of both
        beyond[np.isfinite(beyond)] = 3.0
    ends = [(1 + (seed + c) % 2, PLACES - len(row)) for c, row in enumerate(rows)]
    ends = [(min(least, most), most) for least, most in ends]
    bounds = least_apart(added, beyond, rows, ends)
    for row, within, bound in zip(rows, ends, bounds, strict=True):
        found = exactly(added, beyond, row, within)
        assert bound == found if flat else bound <= found


def test_a_bound_counts_only_what_the_first_stage_may_be() -> None:
    added, beyond = tables(3, 1)
    (free,) = least_apart(added, beyond, [[0, 0]], [(1, PLACES - 2)])
    each = [least_apart(added, beyond, [[0, 0]], [(end, end)])[0] for end in range(1, PLACES - 1)]
    assert free <= min(each) and max(each) > free
