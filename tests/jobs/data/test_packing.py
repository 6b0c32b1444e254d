"""The packed order: whole epochs, no sample lost or repeated, any micro-batch without those before it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.data.packing import PackedOrder, cut

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=60)


def order(lengths: list[int], **changes: Any) -> PackedOrder:
    values: dict[str, Any] = {"seed": 3, "capacity": 12, "slots": 4, "rows": 2, "micro_batches": 3, **changes}
    return PackedOrder(values.pop("seed"), np.asarray(lengths), **values)


def next_fit(lengths: list[int], capacity: int, slots: int) -> list[int]:
    """One sample after the other, as one would do it by hand."""
    starts, used, taken = [0], 0, 0
    for place, length in enumerate(lengths):
        if used + length > capacity or taken == slots:
            starts.append(place)
            used = taken = 0
        used, taken = used + length, taken + 1
    return [*starts, len(lengths)]


@given(lengths=LENGTHS, slots=st.integers(1, 5))
def test_cut_is_next_fit(lengths: list[int], slots: int) -> None:
    assert cut(np.asarray(lengths), 12, slots).tolist() == next_fit(lengths, 12, slots)


@given(lengths=LENGTHS, seed=st.integers(0, 100), rows=st.integers(1, 3), slots=st.integers(1, 5))
def test_every_epoch_has_every_sample_once(lengths: list[int], seed: int, rows: int, slots: int) -> None:
    packed = order(lengths, seed=seed, rows=rows, slots=slots)
    seen: dict[int, list[int]] = {}
    last = -1
    for step in range(1, 200):
        for micro_batch in range(3):
            members = packed.rows(step, micro_batch)
            assert len(members) == rows
            for row in members:
                assert row.epoch in (last, last + 1), "epochs follow each other"
                last = row.epoch
                assert 1 <= len(row.samples) <= slots
                assert sum(lengths[sample] for sample in row.samples) <= 12
                seen.setdefault(row.epoch, []).extend(row.samples)
        if last >= 3:
            break
    for epoch in range(last):
        assert Counter(seen[epoch]) == Counter(range(len(lengths)))
    assert max(Counter(seen[last]).values()) == 1


def test_epochs_are_shuffled_anew_and_seeds_differ() -> None:
    lengths = [3] * 40
    orders = []
    for seed in (1, 2):
        packed = order(lengths, seed=seed, rows=5, micro_batches=2)  # ten rows, four samples each: an epoch
        for step in (1, 2):
            orders.append([s for m in (0, 1) for row in packed.rows(step, m) for s in row.samples])
    assert all(sorted(each) == list(range(40)) for each in orders)
    assert len({tuple(each) for each in orders}) == 4


def test_random_access_does_not_depend_on_what_came_before() -> None:
    lengths = [1 + number * 5 % 12 for number in range(50)]
    straight = order(lengths)
    expected = {(step, m): straight.rows(step, m) for step in range(1, 60) for m in range(3)}
    for step in (59, 1, 30, 2, 58):
        for m in (2, 0, 1):
            assert order(lengths).rows(step, m) == expected[step, m]
    jumping = order(lengths)
    for step in (59, 1, 30, 2, 58):
        assert jumping.rows(step, 1) == expected[step, 1]


def test_a_micro_batch_may_span_two_epochs() -> None:
    packed = order([6, 6, 6], rows=2, micro_batches=1)  # two rows an epoch, the second half empty
    assert packed.rows_of(0) == 2
    odd = order([6] * 5, rows=2, micro_batches=1)  # three rows an epoch
    assert [row.epoch for row in odd.rows(2, 0)] == [0, 1]


@pytest.mark.parametrize(
    ("lengths", "changes", "words"),
    [
        ([13], {}, "context"),
        ([], {}, "no rows"),
        ([3], {"slots": 0}, "slots"),
        ([3], {"rows": 0}, "micro_batch_size"),
    ],
)
def test_mistakes(lengths: list[int], changes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        order(lengths, **changes)
