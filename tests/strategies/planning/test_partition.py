"""The minimax cut equals brute force, and micro-batches are dealt once and as fast as can be."""

from __future__ import annotations

import heapq
from collections import Counter
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.planning.partition import (
    HEAPED,
    OUT_OF_REACH,
    TOLERANCE,
    cut_for_groups,
    cut_for_many,
    cut_layers,
    deal_micro_batches,
    group_rounds,
    group_sizes,
)

SECONDS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def all_cuts(length: int, parts: int) -> list[tuple[int, ...]]:
    return [(0, *inner, length) for inner in combinations(range(1, length), parts - 1)]


@given(seconds=SECONDS, workers=st.integers(1, 6), micro_batches=st.integers(1, 9), data=st.data())
@settings(max_examples=150)
def test_equal_workers_brute_force(
    seconds: list[int], workers: int, micro_batches: int, data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, min(len(seconds), workers)))
    cut = cut_layers(seconds, [1.0] * workers, micro_batches, stages)
    least = min(
        max(
            sum(seconds[a:b]) * -(-micro_batches // (d - c))
            for (a, b), (c, d) in zip(pairwise(bounds), pairwise(groups), strict=True)
        )
        for bounds, groups in product(all_cuts(len(seconds), stages), all_cuts(workers, stages))
    )
    assert cut is not None and cut.seconds == pytest.approx(least, rel=TOLERANCE)
    assert len(cut.sizes) == stages and min(cut.sizes) >= 1 and sum(cut.sizes) <= workers
    assert cut.bounds[0] == 0 and cut.bounds[-1] == len(seconds)
    realised = [
        sum(seconds[a:b]) * -(-micro_batches // size)
        for (a, b), size in zip(pairwise(cut.bounds), cut.sizes, strict=True)
    ]
    assert max(realised) == pytest.approx(cut.seconds)


@given(
    seconds=SECONDS,
    speeds=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5]), min_size=1, max_size=6),
    data=st.data(),
)
@settings(max_examples=150)
def test_unequal_workers_brute_force(seconds: list[int], speeds: list[float], data: st.DataObject) -> None:
    speeds = [2.0, *speeds]  # never all alike
    stages = data.draw(st.integers(1, min(len(seconds), len(speeds))))
    cut = cut_layers(seconds, speeds, 8, stages)
    least = min(
        max(
            sum(seconds[a:b]) * 8 / sum(speeds[c:d])
            for (a, b), (c, d) in zip(pairwise(bounds), pairwise(groups), strict=True)
        )
        for bounds, groups in product(all_cuts(len(seconds), stages), all_cuts(len(speeds), stages))
    )
    assert cut is not None and cut.seconds == pytest.approx(least, rel=TOLERANCE)


@given(seconds=SECONDS, data=st.data())
@settings(max_examples=150)
def test_given_groups_brute_force(seconds: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(seconds)))
    rounds = data.draw(st.lists(st.sampled_from([1.0, 2.0, 3.0, 7.5]), min_size=stages, max_size=stages))

    def longest(bounds: tuple[int, ...]) -> float:
        return max(sum(seconds[a:b]) * each for (a, b), each in zip(pairwise(bounds), rounds, strict=True))

    bounds = cut_for_groups(seconds, rounds)
    assert bounds in all_cuts(len(seconds), stages)
    least = min(map(longest, all_cuts(len(seconds), stages)))
    assert longest(bounds) == pytest.approx(least, rel=TOLERANCE)


@given(seconds=st.one_of(SECONDS, st.integers(1, 9).map(lambda layers: [3] * layers)), data=st.data())
@settings(max_examples=150)
def test_many_cuts_are_as_good_as_one_by_one(seconds: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(seconds)))
    weight = st.sampled_from([0.001, 1.0, 2.0, 3.0, 7.5])
    rows = data.draw(st.lists(st.lists(weight, min_size=stages, max_size=stages), min_size=1, max_size=5))
    many = cut_for_many(seconds, np.array(rows))
    assert many.shape == (len(rows), stages + 1)
    for row, bounds in zip(rows, many.tolist(), strict=True):

        def longest(bounds: tuple[int, ...], row: list[float] = row) -> float:
            return max(sum(seconds[a:b]) * each for (a, b), each in zip(pairwise(bounds), row, strict=True))

        assert tuple(bounds) in all_cuts(len(seconds), stages)
        least = longest(cut_for_groups(seconds, row))
        assert longest(tuple(bounds)) >= least * (1 - TOLERANCE)
        if len(set(seconds)) == 1:
            assert longest(tuple(bounds)) <= least * (1 + 20 * TOLERANCE)


@given(workers=st.integers(1, 9), stages=st.integers(1, 4))
def test_group_sizes_are_all_partitions(workers: int, stages: int) -> None:
    every = {
        tuple(sorted(sizes, reverse=True))
        for sizes in product(range(1, workers + 1), repeat=stages)
        if sum(sizes) == workers
    }
    listed = list(group_sizes(workers, stages))
    assert set(listed) == every and len(listed) == len(every)


@pytest.mark.parametrize("speeds", [[1.0] * 4, [1.0, 0.5, 1.0, 2.0]])
def test_memory_forces_larger_groups_or_forbids(speeds: list[float]) -> None:
    fewest = np.ones((5, 5), dtype=np.int64)
    fewest[0, 1:] = 3  # whoever holds layer 0 needs two companions
    cut = cut_layers([1.0, 1.0, 1.0, 1.0], speeds, 8, 2, fewest)
    assert cut is not None and cut.sizes[0] == 3
    fewest[0, 1:] = OUT_OF_REACH
    assert cut_layers([1.0, 1.0, 1.0, 1.0], speeds, 8, 2, fewest) is None


def test_layers_that_take_no_time_are_cut_too() -> None:
    cut = cut_layers([0.0, 1.0, 0.0, 1.0], [1.0, 1.0], 4, 2)
    assert cut is not None and cut.seconds == pytest.approx(4.0)
    assert cut_layers([0.0, 0.0], [1.0, 1.0], 4, 2) is not None
    assert cut_for_groups([0.0, 0.0], [1.0, 1.0]) == (0, 1, 2)


@given(
    speeds=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]), min_size=1, max_size=4),
    micro_batches=st.integers(1, 7),
)
@settings(max_examples=100)
def test_dealing_is_whole_and_minimal(speeds: list[float], micro_batches: int) -> None:
    dealt = deal_micro_batches(list(enumerate(speeds)), micro_batches)
    assert len(dealt) == micro_batches
    counts = Counter(dealt)
    finish = max(counts[w] / speed for w, speed in enumerate(speeds))
    least = min(
        max(n / speed for n, speed in zip(split, speeds, strict=True))
        for split in product(range(micro_batches + 1), repeat=len(speeds))
        if sum(split) == micro_batches
    )
    assert finish == least == group_rounds(speeds, micro_batches)


def test_equal_workers_take_turns() -> None:
    assert deal_micro_batches([(4, 1.0), (2, 1.0), (9, 1.0)], 7) == (2, 4, 9, 2, 4, 9, 2)


@given(
    speeds=st.lists(st.sampled_from([0.1, 0.5, 0.75, 1.0, 1.3]), min_size=2, max_size=40),
    micro_batches=st.integers(HEAPED + 1, 4 * HEAPED),
)
@settings(max_examples=60)
def test_many_micro_batches_are_dealt_as_one_by_one(speeds: list[float], micro_batches: int) -> None:
    group = [(3 * place + 1, speed) for place, speed in enumerate(speeds)]
    finish = [(1 / speed, worker, 1, speed) for worker, speed in group]
    heapq.heapify(finish)
    latest, dealt = 0.0, []
    for _ in range(micro_batches):
        latest, worker, count, speed = finish[0]
        dealt.append(worker)
        heapq.heapreplace(finish, ((count + 1) / speed, worker, count + 1, speed))
    assert deal_micro_batches(group, micro_batches) == tuple(dealt)
    assert group_rounds(speeds, micro_batches) == latest
