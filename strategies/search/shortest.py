"""The path through a row of stages with the least sum of one cost and maximum of another."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
"""[from, to], over places before and after a stage; infinite where there is no way."""

NEVER = np.inf

ALIKE = 1e-12
"""Relative: sums that differ by less are the same, added up in another order."""

Path = tuple[int, ...]
"""The place after every stage."""


def least_sum_and_maximum(
    added: Sequence[Matrix], beyond: Sequence[Matrix], tolerance: float = 0.0
) -> tuple[float, Path] | None:
    """The least sum(added) + max(beyond) over stages, and its path; None where nothing is finite.

    ``added[k]`` and ``beyond[k]`` are infinite at the same places; stage k's columns are stage k + 1's rows.
    Under a limit for the maximum the least sum is a shortest path, which does not rise with the limit. So
    the limits between two whose sums are known cost at least the upper one's sum and the lower limit:
    intervals are halved until none can hold anything better by more than ``tolerance``, relatively.
    """
    lowest = _least_maximum(beyond)
    if not np.isfinite(lowest):
        return None
    tightest, freest = _shortest(added, beyond, lowest), _shortest(added, beyond, NEVER)
    assert tightest is not None and freest is not None, "the least maximum can be reached"
    best = min((each[0] + each[1], each[2]) for each in (tightest, freest))
    highest = best[0] - freest[0]  # a maximum above this is no better, whatever the sum
    close = max(tolerance, ALIKE)
    if not lowest < highest or freest[0] + lowest >= best[0] * (1 - close):
        return best
    # stages in the middle have their tables in common
    apart = {id(each): each for each in beyond}.values()
    between = [each[(each > lowest) & (each < highest)] for each in apart]
    limits = np.unique(np.concatenate([*between, (lowest, highest)]))
    intervals = [(freest[0] + lowest, 0, len(limits) - 1, freest[0])]
    while intervals:
        bound, low, high, least = heappop(intervals)
        if bound >= best[0] * (1 - close):
            break
        middle = (low + high) // 2
        if middle == low:
            continue
        found = _shortest(added, beyond, limits[middle])
        assert found is not None, "a higher limit allows what a lower one does"
        best = min(best, (found[0] + found[1], found[2]))
        heappush(intervals, (found[0] + limits[low], low, middle, found[0]))
        heappush(intervals, (least + limits[middle], middle, high, least))
    return best


def least_apart(
    added_NFS: NDArray[np.float64],
    beyond_NFS: NDArray[np.float64],
    rows: Sequence[Sequence[int]],
    firsts: Sequence[tuple[int, int]],
) -> NDArray[np.float64]:
    """No path through each of many rows of stages takes less: the least sum and the least maximum, each of
    whatever path; infinite where there is none.

    ``rows[c]`` are the places in the tables of c's stages; its first stage begins at place 0 and ends at one
    of ``firsts[c]`` (from, to), its last one ends at the last place.
    """
    stages_C = np.asarray([len(each) for each in rows])
    order_C = np.argsort(-stages_C, kind="stable")  # those that go on are always the first
    stages_C, ends = stages_C[order_C], added_NFS.shape[2]
    rows_CK = np.zeros((len(rows), int(stages_C[0])), dtype=np.int64)
    barred_CS = np.ones((len(rows), ends), dtype=bool)
    for c, place in enumerate(order_C.tolist()):
        rows_CK[c, : len(rows[place])] = rows[place]
        barred_CS[c, firsts[place][0] : firsts[place][1] + 1] = False
    sum_CS, most_CS = added_NFS[rows_CK[:, 0], 0], beyond_NFS[rows_CK[:, 0], 0]
    sum_CS[barred_CS] = most_CS[barred_CS] = NEVER
    for k in range(1, rows_CK.shape[1]):
        on = int((stages_C > k).sum())
        # every stage before and after takes a place at least
        last = ends - int(stages_C[on - 1]) + k
        before, after = slice(k, last), slice(k + 1, last + 1)
        through = added_NFS[:, before, after][rows_CK[:on, k]]
        through += sum_CS[:on, before, None]
        sum_CS[:on, after] = through.min(axis=1)
        through = beyond_NFS[:, before, after][rows_CK[:on, k]]
        np.maximum(through, most_CS[:on, before, None], out=through)
        most_CS[:on, after] = through.min(axis=1)
    least_C = np.empty(len(rows))
    least_C[order_C] = sum_CS[:, -1] + most_CS[:, -1]
    return least_C


def _shortest(
    added: Sequence[Matrix], beyond: Sequence[Matrix], limit: float
) -> tuple[float, float, Path] | None:
    """(sum, maximum, path) of the least sum with no maximum above ``limit``; O(stages x places^2)."""
    reach = np.zeros(1)
    origins = []
    for added_FS, beyond_FS in zip(added, beyond, strict=True):
        through = reach[:, None] + added_FS
        if limit < NEVER:
            np.copyto(through, NEVER, where=beyond_FS > limit)
        origin = through.argmin(axis=0)
        reach = through.min(axis=0)
        origins.append(origin)
    if not reach[0] < NEVER:
        return None
    path = [0]
    for origin in reversed(origins):
        path.append(int(origin[path[-1]]))
    path.reverse()
    most = max(float(each[a, b]) for each, (a, b) in zip(beyond, pairwise(path), strict=True))
    return float(reach[0]), most, tuple(path[1:])


def _least_maximum(beyond: Sequence[Matrix]) -> float:
    reach = np.full(1, -NEVER)
    for beyond_FS in beyond:
        reach = np.maximum(reach[:, None], beyond_FS).min(axis=0)
    return float(reach[0])
