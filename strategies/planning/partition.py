"""Layers into stages, workers into stage groups, micro-batches over workers: the arithmetic.

The planner builds its candidates from these; each function is pure and solves one problem.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from runtime.plan import WorkerId

MOST_STAGES = 8
"""Up to how many stages are tried where their number is free."""

TOLERANCE = 1e-4
"""How far above the optimum ``cut_layers`` may stop, relative; measured seconds are far coarser."""

FLUID = 50
"""Workers per stage from which on a few slow ones do not change where layers are cut: the mean counts."""

EQUAL_SPEEDS = 1.05
"""Workers whose speeds differ by no more than this factor count as equally fast (it is noise)."""

HEAPED = 128
"""Up to how many micro-batches are dealt one by one; more are dealt by arrays."""

OUT_OF_REACH = 1 << 40
"""More workers than there ever are: no group can hold that stage."""


def deal_micro_batches(group: Sequence[tuple[WorkerId, float]], micro_batches: int) -> tuple[WorkerId, ...]:
    """The worker of each micro-batch, from (worker, speed) pairs: always the one that would finish it
    first, then the lowest id.

    Minimal in the finish time of the group (list scheduling of equal jobs on uniform machines),
    and consecutive micro-batches go round the group. Workers beyond the last useful one get none.
    """
    if len({speed for _, speed in group}) == 1:
        turn = sorted(worker for worker, _ in group)
        return tuple((turn * -(-micro_batches // len(turn)))[:micro_batches])
    if micro_batches > HEAPED:
        finish_N, place_N = _finishes([speed for _, speed in group], micro_batches)
        worker_N = np.array([worker for worker, _ in group])[place_N]
        first_M = np.lexsort((worker_N, finish_N))[:micro_batches]
        return tuple(worker_N[first_M].tolist())
    finish = [(1 / speed, worker, 1, speed) for worker, speed in group]
    heapq.heapify(finish)
    dealt = []
    for _ in range(micro_batches):
        _, worker, count, speed = finish[0]
        dealt.append(worker)
        heapq.heapreplace(finish, ((count + 1) / speed, worker, count + 1, speed))
    return tuple(dealt)


def group_rounds(speeds: Sequence[float], micro_batches: int) -> float:
    """The finish time of ``deal_micro_batches`` where one micro-batch takes 1 at speed 1.0."""
    if len(set(speeds)) == 1:
        return -(-micro_batches // len(speeds)) / speeds[0]
    if micro_batches > HEAPED:
        finish_N, _ = _finishes(speeds, micro_batches)
        return float(np.partition(finish_N, micro_batches - 1)[micro_batches - 1])
    finish = [(1 / speed, 1, speed) for speed in speeds]
    heapq.heapify(finish)
    latest = 0.0
    for _ in range(micro_batches):
        latest, count, speed = finish[0]
        heapq.heapreplace(finish, ((count + 1) / speed, count + 1, speed))
    return latest


def _finishes(speeds: Sequence[float], micro_batches: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """When each worker would finish its first, second, ... micro-batch, and which worker that is, in no
    order: the first ``micro_batches`` of all and more."""
    speed_W = np.asarray(speeds, dtype=np.float64)
    latest = (micro_batches + len(speed_W)) / speed_W.sum()  # everybody has rounded down at most one by then
    counts_W = (latest * speed_W).astype(np.int64) + 1
    place_N = np.repeat(np.arange(len(speed_W)), counts_W)
    number_N = np.arange(len(place_N)) - np.repeat(np.cumsum(counts_W) - counts_W, counts_W) + 1
    return number_N / speed_W[place_N], place_N


def speeds_equal(speeds: Sequence[float]) -> bool:
    return max(speeds) <= EQUAL_SPEEDS * min(speeds)


@dataclass(frozen=True, slots=True)
class Cut:
    """Stage k holds layers ``bounds[k]`` to ``bounds[k+1] - 1`` and needs ``sizes[k]`` workers.

    ``seconds`` is the largest stage's time for all its micro-batches. The sizes may sum to less
    than all workers: the rest cannot lower the maximum.
    """

    bounds: tuple[int, ...]
    sizes: tuple[int, ...]
    seconds: float


def cut_layers(
    layer_seconds: Sequence[float],
    speeds: Sequence[float],
    micro_batches: int,
    stages: int,
    fewest_workers: NDArray[np.int64] | None = None,
) -> Cut | None:
    """Cuts layers into ``stages`` contiguous stages and workers into groups: least largest stage time.

    The minimax dynamic programme over cut and group size together of PipeDream (Narayanan et al.,
    SOSP'19, sec. 3.1), f[k][l][w] = min over l', w' of max(f[k-1][l'][w-w'], time(l'..l on w')),
    solved the other way round: for a time limit T, reach[k][l] = the fewest workers with which k
    stages compute layers 0..l-1 within T; then T is bisected. That is O(K L^2) per limit
    instead of O(K L^2 W^2) altogether and exact to ``TOLERANCE``.

    Stage time is seconds x ceil(micro-batches / workers) / mean speed where all are equally fast (or so
    many that the mean counts, ``FLUID``),
    and seconds x micro-batches / (sum of the group's speeds) where they are not; groups are then
    runs of ``speeds`` in the given order. ``fewest_workers[l', l]`` is a lower bound on the group
    of a stage of layers l' to l-1 (memory; ``OUT_OF_REACH`` forbids the stage).
    Returns None where that bound leaves no solution. Needs stages <= workers and <= layers.
    """
    layers, workers = len(layer_seconds), len(speeds)
    assert 1 <= stages <= min(layers, workers)
    search = _Search(layer_seconds, speeds, micro_batches, stages, fewest_workers)
    work = float(search.seconds[0, layers]) * micro_batches
    low = work / float(search.power[-1])
    upper = 2 * work / min(speeds)  # enough for one worker, even the slowest, per stage
    limit = low
    while (best := search.within(limit)) is None:
        if limit >= upper:
            return None
        low, limit = limit, min(limit * 1.1, upper)
    while best.seconds > low * (1 + TOLERANCE):
        limit = (low + best.seconds) / 2
        better = search.within(limit)
        if better is None:
            low = limit
        else:
            best = better
    return best


def cut_for_groups(layer_seconds: Sequence[float], rounds: Sequence[float]) -> tuple[int, ...]:
    """The bounds of stages, one layer or more each, with the least max of seconds[k] x ``rounds[k]``.

    For stage groups that are given (``rounds`` as of ``group_rounds``): the same programme with the
    group sizes fixed, f[k][l] = min over l' of max(f[k-1][l'], seconds(l'..l) x rounds[k]), exactly.
    """
    layers = len(layer_seconds)
    assert 1 <= len(rounds) <= layers
    before = np.concatenate(([0.0], np.cumsum(np.asarray(layer_seconds, dtype=np.float64))))
    index = np.arange(layers + 1)
    seconds = np.where(index[:, None] < index[None, :], before[None, :] - before[:, None], np.inf)
    longest = np.full(layers + 1, np.inf)
    longest[0] = 0.0
    origins = []
    for each in rounds:
        through = np.maximum(longest[:, None], seconds * each)
        origin = through.argmin(axis=0)
        longest = through[origin, index]
        origins.append(origin)
    bounds = [layers]
    for origin in reversed(origins):
        bounds.append(int(origin[bounds[-1]]))
    return tuple(reversed(bounds))


def group_sizes(workers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to share ``workers`` out among ``stages`` groups of one or more, each in descending
    order: the partitions of an integer into a fixed number of parts."""
    yield from _descending(workers, stages, workers)


def _descending(workers: int, stages: int, largest: int) -> Iterator[tuple[int, ...]]:
    if stages == 1:
        if 1 <= workers <= largest:
            yield (workers,)
        return
    for first in range(min(largest, workers - stages + 1), -(-workers // stages) - 1, -1):
        for rest in _descending(workers - first, stages - 1, first):
            yield (first, *rest)


def cut_for_many(layer_seconds: Sequence[float], weights_CK: NDArray[np.float64]) -> NDArray[np.int64]:
    """``bounds_CB``, B = K + 1, for C problems at once: the least max of seconds[k] x ``weights_CK[:, k]``.

    The limit is bisected, and stage after stage takes as many layers as fit it. That is what
    ``cut_for_groups`` finds, to ten times ``TOLERANCE``, for layers of equal length; where a stage is down
    to one layer of several lengths it may be more: good enough to rank. Weights must be positive
    and K at most the layers.
    """
    layers, (problems, stages) = len(layer_seconds), weights_CK.shape
    assert 1 <= stages <= layers
    before = np.concatenate(([0.0], np.cumsum(np.asarray(layer_seconds, dtype=np.float64))))
    most = layers - stages + 1 + np.arange(stages)  # every later stage keeps a layer
    low_C = (before[-1] / (1.0 / weights_CK).sum(axis=1)) * (1 - TOLERANCE)
    high_C = before[-1] * weights_CK.max(axis=1)
    best_CB = np.zeros((problems, stages + 1), dtype=np.int64)
    limit_C = high_C
    while True:
        bounds_CB = np.zeros_like(best_CB)
        ends_CK = limit_C[:, None] / weights_CK * (1 + 1e-12)
        fits_C = np.ones(problems, dtype=bool)
        for k in range(stages):
            begin_C = bounds_CB[:, k]
            end_C = before.searchsorted(before[begin_C] + ends_CK[:, k], side="right") - 1
            fits_C &= end_C > begin_C
            bounds_CB[:, k + 1] = np.minimum(np.maximum(end_C, begin_C + 1), most[k])
        fits_C &= bounds_CB[:, -1] == layers
        best_CB[fits_C] = bounds_CB[fits_C]
        high_C = np.where(fits_C, limit_C, high_C)
        low_C = np.where(fits_C, low_C, limit_C)
        if (high_C - low_C <= 10 * TOLERANCE * high_C).all():
            return best_CB
        limit_C = (low_C + high_C) / 2


class _Search:
    """Answers, for one problem and any time limit: is there a cut within the limit?"""

    def __init__(
        self,
        layer_seconds: Sequence[float],
        speeds: Sequence[float],
        micro_batches: int,
        stages: int,
        fewest_workers: NDArray[np.int64] | None,
    ) -> None:
        self.layers, self.stages, self.micro_batches = len(layer_seconds), stages, micro_batches
        self.equal = speeds_equal(speeds) or len(speeds) >= FLUID * stages
        self.power = np.concatenate(([0.0], np.cumsum(np.asarray(speeds, dtype=np.float64))))
        self.speed = float(self.power[-1]) / len(speeds)
        before = np.concatenate(([0.0], np.cumsum(np.asarray(layer_seconds, dtype=np.float64))))
        self.tiny = max(float(before[-1]), 1e-9) * 1e-9  # layers that take no time divide by zero
        self.seconds = np.maximum(before[None, :] - before[:, None], self.tiny)
        index = np.arange(self.layers + 1)
        self.forbidden = index[:, None] >= index[None, :]
        self.fewest = np.ones_like(self.seconds, dtype=np.int64) if fewest_workers is None else fewest_workers

    def within(self, limit: float) -> Cut | None:
        size = self._sizes(limit) if self.equal else None
        reach = np.full(self.layers + 1, OUT_OF_REACH, dtype=np.int64)
        reach[0] = 0
        reaches, origins = [reach], []
        for _ in range(self.stages):
            end = reach[:, None] + size if size is not None else self._ends(reach, limit)
            origin = end.argmin(axis=0)
            reach = end[origin, np.arange(self.layers + 1)]
            reaches.append(reach)
            origins.append(origin)
        if reach[self.layers] >= len(self.power):
            return None
        bounds, positions = [self.layers], [int(reach[self.layers])]
        for origin, earlier in zip(reversed(origins), reversed(reaches[:-1]), strict=True):
            bounds.append(int(origin[bounds[-1]]))
            positions.append(int(earlier[bounds[-1]]))
        bounds.reverse()
        positions.reverse()
        sizes = tuple(b - a for a, b in pairwise(positions))
        seconds = max(
            float(self.seconds[first, stop]) * self._rounds(a, b)
            for first, stop, a, b in zip(bounds, bounds[1:], positions, positions[1:], strict=False)
        )
        return Cut(tuple(bounds), sizes, seconds)

    def _rounds(self, first: int, stop: int) -> float:
        if self.equal:
            return -(-self.micro_batches // (stop - first)) / self.speed
        return self.micro_batches / float(self.power[stop] - self.power[first])

    def _sizes(self, limit: float) -> NDArray[np.int64]:
        """The fewest equally fast workers for each stage, [first layer, stop layer]."""
        each = np.minimum(limit * (1 + 1e-12) * self.speed / self.seconds + 1e-9, self.micro_batches)
        each = each.astype(np.int64)
        size = np.maximum(-(-self.micro_batches // np.maximum(each, 1)), self.fewest)
        return np.where(self.forbidden | (each < 1), OUT_OF_REACH, size)

    def _ends(self, reach: NDArray[np.int64], limit: float) -> NDArray[np.int64]:
        """Where the group of each stage ends if it begins at ``reach[first layer]``."""
        begin = np.minimum(reach, len(self.power))
        power = np.append(self.power, np.inf)[begin]
        needed = power[:, None] + self.seconds * (self.micro_batches / limit) * (1 - 1e-12)
        end = np.searchsorted(self.power, needed)
        end = np.maximum(end, begin[:, None] + self.fewest)
        return np.where(self.forbidden | (end >= len(self.power)), OUT_OF_REACH, end)
