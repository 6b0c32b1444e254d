"""Slices, heads and teams: whole, contiguous, even, and the published bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.sequence.division import dealt, slice_bounds, team_sizes, team_speed
from tests.support.sequences import elements_sent


@given(parts=st.integers(0, 200), members=st.integers(1, 40))
def test_every_part_is_dealt_once_and_evenly(parts: int, members: int) -> None:
    runs = dealt(parts, members)
    assert [part for run in runs for part in run] == list(range(parts))
    sizes = [len(run) for run in runs]
    assert len(sizes) == members and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@given(tokens=st.integers(1, 500), slices=st.integers(1, 50))
def test_slices_cover_the_sequence(tokens: int, slices: int) -> None:
    if tokens < slices:
        with pytest.raises(ValueError, match=r"lower parallel\.sequence_slices"):
            slice_bounds(tokens, slices)
        return
    bounds = slice_bounds(tokens, slices)
    lengths = [stop - start for start, stop in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(lengths)) == (0, tokens, slices)
    assert max(lengths) - min(lengths) <= 1 and min(lengths) >= 1


@given(workers=st.integers(1, 300), most=st.integers(1, 40))
def test_teams_are_few_even_and_not_too_large(workers: int, most: int) -> None:
    sizes = team_sizes(workers, most)
    assert sum(sizes) == workers and max(sizes) <= most
    assert len(sizes) == -(-workers // most) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("team", [2, 4, 8])
def test_bytes_are_the_published_ones_where_all_divides_evenly(team: int) -> None:
    """4 (N / P) h (P - 1) / P a member: constant where the tokens grow with the team, but for (P - 1) / P."""
    tokens, heads, head = 512 * team, 8, 16
    sent = elements_sent(tokens, 8, heads, team, (3 * head, head))
    assert set(sent) == {4 * 512 * heads * head * (team - 1) // team}


def test_a_team_waits_for_its_slowest() -> None:
    assert team_speed([1.0], 4) == 1.0
    assert team_speed([1.0, 1.0], 4) == 2.0
    assert team_speed([1.0, 1.0, 1.0], 4) == 2.0  # one has two slices of the four
    assert team_speed([1.0, 0.25], 4) == 0.5
