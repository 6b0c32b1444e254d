from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.streams import SampleOrder, permutation, permuted, seed_layer, stream_key


def test_keys_are_stable_across_versions_and_machines() -> None:
    assert stream_key(1, 2, 3, 4) == 4194058949220624834
    assert stream_key("sample order", 7) == 3266002464713655418


@given(
    a=st.lists(st.one_of(st.integers(), st.text()), max_size=4),
    b=st.lists(st.one_of(st.integers(), st.text()), max_size=4),
)
def test_different_parts_have_different_keys(a: list[int | str], b: list[int | str]) -> None:
    assert 0 <= stream_key(*a) < 2**63
    assert (stream_key(*a) == stream_key(*b)) == (a == b)


def test_numbers_and_their_texts_are_told_apart() -> None:
    assert stream_key(1) != stream_key("1")
    assert stream_key(1, 23) != stream_key(12, 3)
    assert stream_key("a,i1") != stream_key("a", 1)


def test_a_layer_draws_the_same_numbers_whatever_came_before() -> None:
    cpu = torch.device("cpu")
    seed_layer(5, 1, 2, 3, cpu)
    expected = torch.rand(4)
    torch.rand(1000)
    seed_layer(5, 1, 2, 4, cpu)
    assert not torch.equal(torch.rand(4), expected)
    seed_layer(5, 1, 2, 3, cpu)
    assert torch.equal(torch.rand(4), expected)


@settings(max_examples=60)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_the_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(i, size, seed, epoch) for i in range(size)) == list(range(size))


def test_the_permutation_mixes() -> None:
    size = 4096
    order = [permuted(i, size, 1, 0) for i in range(size)]
    # Neighbours that stay neighbours, and fixed points: about 2 and 1 expected of a random one.
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 12
    assert sum(i == x for i, x in enumerate(order)) < 10
    assert order != [permuted(i, size, 1, 1) for i in range(size)]
    assert order != [permuted(i, size, 2, 0) for i in range(size)]


@settings(max_examples=40)
@given(data=st.data())
def test_no_sample_repeats_within_an_epoch(data: st.DataObject) -> None:
    micro_batches = data.draw(st.integers(1, 5))
    size = data.draw(st.integers(1, 4))
    samples = data.draw(st.integers(micro_batches * size, 150))
    order = SampleOrder(data.draw(st.integers(0, 99)), samples, size, micro_batches)
    steps = order.steps_per_epoch
    for epoch in (0, 3):
        seen = [
            sample
            for step in range(epoch * steps + 1, (epoch + 1) * steps + 1)
            for m in range(micro_batches)
            for sample in order.samples(step, m)
        ]
        assert all(order.epoch(s) == epoch for s in (epoch * steps + 1, (epoch + 1) * steps))
        assert len(seen) == steps * order.global_batch == len(set(seen))
        assert set(seen) <= set(range(samples))
        assert samples - len(seen) < order.global_batch


def test_sample_order_is_random_access_and_reshuffled() -> None:
    order = SampleOrder(seed=3, samples=100, micro_batch_size=4, micro_batches=5)
    assert order.steps_per_epoch == 5
    again = SampleOrder(seed=3, samples=100, micro_batch_size=4, micro_batches=5)
    assert again.samples(17, 2) == order.samples(17, 2)
    assert order.samples(1, 0) != order.samples(6, 0)
    huge = SampleOrder(seed=3, samples=10**12, micro_batch_size=4, micro_batches=5)
    assert len(set(huge.samples(10**9, 4))) == 4


@pytest.mark.parametrize(("samples", "size", "micro_batches"), [(19, 4, 5), (10, 0, 1), (10, 1, 0)])
def test_impossible_orders_are_refused(samples: int, size: int, micro_batches: int) -> None:
    with pytest.raises(ValueError, match="micro_batch"):
        SampleOrder(0, samples, size, micro_batches)


@given(size=st.integers(1, 300), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_the_whole_permutation_at_once(size: int, seed: int, epoch: int) -> None:
    whole = permutation(size, seed, epoch)
    assert whole.tolist() == [permuted(position, size, seed, epoch) for position in range(size)]
