"""How a sequence and the heads of an attention are divided among the workers of a team: the arithmetic.

A sequence is cut into a fixed number of *slices*, whoever computes them; a team of at most so many workers
deals slices and heads among its members in contiguous runs. Every slice and every head is computed by
itself, with the same shape, so that the bits do not depend on the team.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def dealt(parts: int, members: int) -> tuple[range, ...]:
    """Runs of ``range(parts)``, one a member: sizes differ by at most one, the larger ones first."""
    smaller, larger = divmod(parts, members)
    starts = [member * smaller + min(member, larger) for member in range(members + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


def slice_bounds(tokens: int, slices: int) -> tuple[int, ...]:
    """Where the slices of a sequence of ``tokens`` begin, and the end of the last: lengths differ by at most
    one. Raises ValueError where there are fewer tokens than slices."""
    if tokens < slices:
        raise ValueError(
            f"a sequence of {tokens} tokens cannot be cut into {slices} slices: lower "
            "parallel.sequence_slices"
        )
    return tuple(tokens * index // slices for index in range(slices + 1))


def team_sizes(workers: int, most: int) -> tuple[int, ...]:
    """As few teams of at most ``most`` as there can be, as even as can be, the larger ones first."""
    return tuple(len(run) for run in dealt(workers, -(-workers // most)))


def team_speed(speeds: Sequence[float], slices: int) -> float:
    """How fast a team is beside one worker of speed 1: the slowest member with the most slices is waited
    for."""
    return min(
        slices / len(run) * speed for run, speed in zip(dealt(slices, len(speeds)), speeds, strict=True)
    )
