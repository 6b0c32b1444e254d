"""Measured seconds without their noise."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from strategies.planning.costs import NOISE, TICK, levelled


@given(st.lists(st.floats(1e-7, 10.0), min_size=1, max_size=40))
def test_levelled_seconds_stay_close_and_in_order(seconds: list[float]) -> None:
    level = levelled(seconds)
    assert len(level) == len(seconds)
    for before, after in zip(seconds, level, strict=True):
        assert after % TICK == 0 and after > 0
        assert abs(after - before) <= NOISE * before * 1.0001 + TICK
    order = sorted(range(len(seconds)), key=lambda layer: seconds[layer])
    assert all(level[a] <= level[b] for a, b in pairwise(order))


def test_equal_layers_under_noise_become_equal_and_their_sums_exact() -> None:
    level = levelled([0.0100, 0.0103, 0.0098, 0.0301, 0.0299, 0.0101])
    assert level[0] == level[1] == level[2] == level[5]
    assert level[3] == level[4] > level[0]
    assert sum(level[:3]) == 3 * level[0]
