from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime import exact


def contributions_of(seed: int, count: int, size: int) -> list[Tensor]:
    """Gradients whose elements span many binades, ties and negative zeros included."""
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for _ in range(count):
        gradient = torch.randn(size, generator=generator)
        gradient *= torch.exp2(torch.randint(-30, 3, (size,), generator=generator).float())
        gradient[::7] = -0.0
        gradient[3::7] = 2.5
        gradients.append(gradient)
    return gradients


def summed(
    gradients: list[Tensor], exponent: int | None, workspace: exact.Workspace
) -> tuple[Tensor, Tensor]:
    accumulator = torch.zeros(gradients[0].numel(), dtype=torch.float64)
    maxima = exact.new_maxima(1)
    for gradient in gradients:
        exact.accumulate(accumulator, gradient, exponent, maxima[0], workspace)
    return accumulator, maxima


def workspace_of(threads: int) -> exact.Workspace:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return exact.Workspace()
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["numpy", "torch"])
def workspace(request: pytest.FixtureRequest) -> exact.Workspace:
    made = workspace_of(1 if request.param == "numpy" else 2)
    assert made.by_numpy == (request.param == "numpy")
    return made


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [0, 1, 300, 2 * exact.Workspace().chunk + 5])
@pytest.mark.parametrize("exponent", [-exact.EXPONENT_LIMIT, -3, 0, 30, exact.EXPONENT_LIMIT])
def test_numpy_and_torch_give_the_same_bits(size: int, exponent: int) -> None:
    """Of what is too large and of what is no number too."""
    gradients = contributions_of(5, 3, size)
    gradients[0][:3] = torch.tensor([math.inf, math.nan, 3e38])[:size]
    for first in (False, True):
        results = []
        for threads in (1, 2):
            workspace, maxima = workspace_of(threads), exact.new_maxima(1)
            total = torch.full((size,), 3.0, dtype=torch.float64)
            for gradient in gradients:
                exact.accumulate(total, gradient, exponent, maxima[0], workspace, first=first)
            results.append((bits_of(total), bits_of(maxima)))
        assert results[0] == results[1]


@settings(max_examples=40)
@given(data=st.data())
def test_the_sum_has_the_same_bits_in_any_order_grouping_and_slicing(data: st.DataObject) -> None:
    workspace = exact.Workspace()
    count = data.draw(st.integers(1, 24))
    size = data.draw(st.integers(1, 300))
    gradients = contributions_of(data.draw(st.integers(0, 2**31)), count, size)
    maxima = torch.stack([g.abs().max() for g in gradients]).max().reshape(1)
    exponent = int(exact.next_exponents(maxima, count)[0])
    assert not exact.overflowed(maxima, torch.tensor([exponent]), count)
    whole, recorded = summed(gradients, exponent, workspace)
    assert torch.equal(recorded, maxima)

    order = data.draw(st.permutations(range(count)))
    owners = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    cut = data.draw(st.integers(0, size))
    total = torch.zeros(size, dtype=torch.float64)
    for owner in data.draw(st.permutations(range(4))):
        mine = [gradients[m] for m in order if owners[m] == owner]
        for part in (slice(0, cut), slice(cut, size)):
            if mine and part.start < part.stop:
                total[part] += summed([g[part] for g in mine], exponent, workspace)[0]
    assert torch.equal(total, whole)

    by_hand = [
        sum(round(Fraction(float(g[i])) * Fraction(2) ** exponent) for g in gradients)
        for i in range(min(size, 20))
    ]
    assert [int(x) for x in whole[:20]] == by_hand


def bits_of(tensor: Tensor) -> list[int]:
    return tensor.view(torch.int64 if tensor.dtype == torch.float64 else torch.int32).tolist()


@pytest.mark.parametrize("size", [300, exact.Workspace().chunk + 5])
def test_the_first_contribution_overwrites_what_lies_there(size: int, workspace: exact.Workspace) -> None:
    """Down to the sign of zero."""
    gradient = contributions_of(3, 1, size)[0]
    for exponent in (20, None):
        there = torch.full((size,), math.nan, dtype=torch.float64)
        maxima = exact.new_maxima(1)
        exact.accumulate(there, gradient, exponent, maxima[0], workspace, first=True)
        expected, recorded = summed([gradient], exponent, workspace)
        assert torch.equal(maxima, recorded)
        assert there.isnan().all() if exponent is None else bits_of(there) == bits_of(expected)
    there_32, zeros_32 = torch.full((size,), math.nan), torch.zeros(size)
    exact.accumulate_fast(there_32, gradient, first=True)
    exact.accumulate_fast(zeros_32, gradient)
    assert bits_of(there_32) == bits_of(zeros_32)


def test_chunks_and_their_tail_are_all_summed(workspace: exact.Workspace) -> None:
    gradient = torch.randn(2 * workspace.chunk + 77, generator=torch.Generator().manual_seed(1))
    total, maxima = summed([gradient, gradient], 30, workspace)
    assert torch.equal(total, 2 * (gradient.double() * 2**30).round())
    assert maxima[0] == gradient.abs().max()


def test_non_contiguous_and_bf16_gradients(workspace: exact.Workspace) -> None:
    gradient = torch.randn(12, 10, generator=torch.Generator().manual_seed(2))
    expected, _ = summed([gradient.T.contiguous()], 20, workspace)
    assert torch.equal(summed([gradient.T], 20, workspace)[0], expected)
    half = gradient.to(torch.bfloat16)
    assert torch.equal(summed([half], 20, workspace)[0], summed([half.float()], 20, workspace)[0])


def test_the_accumulator_may_be_empty(workspace: exact.Workspace) -> None:
    total, maxima = summed([torch.zeros(0)], 3, workspace)
    assert total.numel() == 0 and maxima[0] == 0


def test_probing_records_maxima_only(workspace: exact.Workspace) -> None:
    total, maxima = summed([torch.tensor([0.5, -3.0]), torch.tensor([1.0, 2.0])], None, workspace)
    assert torch.equal(total, torch.zeros(2, dtype=torch.float64))
    assert maxima.tolist() == [3.0]


@settings(max_examples=200)
@given(maximum=st.floats(2.0**-149, 3.4028234663852886e38, width=32), count=st.integers(1, 5000))
def test_exponents_leave_the_promised_room(maximum: float, count: int) -> None:
    maxima = torch.tensor([maximum])
    exponents = exact.next_exponents(maxima, count)
    scaled = Fraction(maximum) * Fraction(2) ** int(exponents[0])
    room = Fraction(2) ** (exact.ACCUMULATOR_BITS - exact.GROWTH_BITS)
    assert count * scaled <= room
    assert abs(int(exponents[0])) <= exact.EXPONENT_LIMIT
    if int(exponents[0]) < exact.EXPONENT_LIMIT:
        assert 4 * count * scaled > room  # no more than two bits are given away (ceilings)
    assert not exact.overflowed(maxima, exponents, count)
    grown = torch.tensor([maximum * 2.0**exact.GROWTH_BITS], dtype=torch.float64)
    assert not exact.overflowed(grown, exponents, count)


def test_a_tensor_without_gradients_has_a_default_exponent() -> None:
    zero, below_one = exact.next_exponents(torch.tensor([0.0, 0.75]), 8).tolist()
    assert zero == below_one == 52 - 3 - 6


def test_contributions_may_differ_by_tensor() -> None:
    assert exact.next_exponents(torch.tensor([0.75, 0.75]), [8, 16]).tolist() == [43, 42]
    maxima = torch.tensor([0.75, 0.75])
    assert not exact.overflowed(maxima, torch.tensor([49, 48]), [8, 16])
    assert exact.overflowed(maxima, torch.tensor([49, 49]), [8, 16])


def test_an_overflow_is_seen_and_the_redone_step_fits(workspace: exact.Workspace) -> None:
    count = 8
    exponents = exact.next_exponents(torch.tensor([1.0]), count)
    gradients = [torch.full((5,), 2.0**7) for _ in range(count)]
    _, maxima = summed(gradients, int(exponents[0]), workspace)
    assert exact.overflowed(maxima, exponents, count)
    redone = exact.next_exponents(maxima, count)
    total, again = summed(gradients, int(redone[0]), workspace)
    assert not exact.overflowed(again, redone, count)
    assert torch.equal(exact.mean_gradient(total, int(redone[0]), 1 / count), gradients[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 5, 100, 300_000])
def test_a_non_finite_gradient_is_never_lost(bad: float, size: int, workspace: exact.Workspace) -> None:
    for exponent in (None, 10):
        maxima = exact.new_maxima(3)
        for gradient in (torch.ones(size), torch.ones(size), torch.full((size,), 7.0)):
            if gradient[0] == 1:
                gradient[size // 2] = bad
            exact.accumulate(torch.zeros(size, dtype=torch.float64), gradient, exponent, maxima[1], workspace)
        assert exact.first_non_finite(maxima) == 1
    assert exact.first_non_finite(torch.zeros(3)) is None


@settings(max_examples=60)
@given(data=st.data())
def test_the_squared_norm_is_the_exact_integer_however_it_is_sliced(data: st.DataObject) -> None:
    bound = 2**53
    values = data.draw(st.lists(st.integers(-bound, bound), max_size=40))
    accumulator = torch.tensor(values, dtype=torch.float64)
    expected = sum(value * value for value in values)
    assert exact.squared_norm(accumulator) == expected
    cut = data.draw(st.integers(0, len(values)))
    parts = exact.squared_norm(accumulator[cut:]) + exact.squared_norm(accumulator[:cut])
    assert parts == expected


def test_the_squared_norm_is_exact_at_the_limit_of_a_chunk() -> None:
    size = 300_001
    worst = 2**53 - 1 - 2**35 - 2**17  # every part near its largest magnitude
    accumulator = torch.full((size,), float(worst), dtype=torch.float64)
    assert exact.squared_norm(accumulator) == size * worst**2
    torch.manual_seed(3)
    accumulator = torch.randint(-(2**52), 2**52, (size,)).double()
    assert exact.squared_norm(accumulator) == sum(int(x) ** 2 for x in accumulator.tolist())


def test_the_squared_norms_of_tensors_that_lie_beside_each_other() -> None:
    torch.manual_seed(9)
    accumulator = torch.randint(-(2**52), 2**52, (100_003,)).double()
    bounds = [(0, 1), (1, 1), (64, 40_000), (40_000, 99_000), (99_008, 100_003)]  # across chunks, with gaps
    expected = [sum(int(x) ** 2 for x in accumulator[start:stop].tolist()) for start, stop in bounds]
    assert exact.squared_norms(accumulator, bounds) == expected
    assert exact.squared_norms(accumulator[:0], [(0, 0)]) == [0]


def test_the_norm_is_close_to_that_of_float64(workspace: exact.Workspace) -> None:
    generator = torch.Generator().manual_seed(4)
    tensors = [
        [torch.randn(size, generator=generator) * scale for _ in range(6)]
        for size, scale in ((1000, 1e-3), (77, 30.0), (5000, 1e-9))
    ]
    maxima = torch.tensor([float(torch.stack(gs).abs().max()) for gs in tensors])
    exponents = exact.next_exponents(maxima, 6).tolist()
    sums = [summed(gs, s, workspace)[0] for gs, s in zip(tensors, exponents, strict=True)]
    squared = exact.combine_squared_norms([exact.squared_norm(x) for x in sums], exponents)
    expected = sum(float(torch.stack(gs).double().sum(0).square().sum()) for gs in tensors)
    assert squared == pytest.approx(expected, rel=1e-9)
    backwards = exact.combine_squared_norms([exact.squared_norm(x) for x in sums][::-1], exponents[::-1])
    assert backwards == squared
    assert exact.combine_squared_norms([], []) == 0.0


def test_the_clip_coefficient_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    for scale in (0.01, 1.0, 50.0):
        parameter.grad = torch.full((4,), scale)
        norm = torch.nn.utils.clip_grad_norm_([parameter], 1.5)
        expected = torch.full((4,), scale) * exact.clip_coefficient(float(norm), 1.5)
        assert torch.allclose(parameter.grad, expected, rtol=1e-6)


def test_the_mean_gradient_of_slices_has_the_bits_of_the_whole() -> None:
    torch.manual_seed(5)
    accumulator = torch.randint(-(2**46), 2**46, (300_000,)).double()
    whole = exact.mean_gradient(accumulator, 41, 0.37 / 96)
    expected = (accumulator / 2.0**41 * (0.37 / 96)).float()
    assert torch.allclose(whole, expected, rtol=1e-6)
    out = torch.empty(300_000)
    for part in (slice(0, 64), slice(64, 200_000), slice(200_000, 300_000)):
        exact.mean_gradient(accumulator[part], 41, 0.37 / 96, out=out[part])
    assert torch.equal(out, whole)


def test_fast_sums_are_float32_sums() -> None:
    total = torch.zeros(6)
    gradient = torch.arange(6.0).reshape(2, 3)
    exact.accumulate_fast(total, gradient)
    exact.accumulate_fast(total, gradient)
    assert total.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


def test_the_norm_of_fast_sums_is_close_to_that_of_float64() -> None:
    assert exact.squared_norm_fast(torch.ones(200_001)) == 200_001.0
    assert exact.squared_norm_fast(torch.ones(0)) == 0.0
    sums = torch.randn(1_000_003, generator=torch.Generator().manual_seed(6)) * 1e-3
    assert exact.squared_norm_fast(sums) == pytest.approx(float(sums.double().square().sum()), rel=1e-6)


@settings(max_examples=50)
@given(data=st.data())
def test_fingerprints_of_parts_add_up_in_any_order(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 200))
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    whole = exact.fingerprint(tensor)
    cut = data.draw(st.integers(0, size))
    parts = exact.fingerprint(tensor[cut:]) + exact.fingerprint(tensor[:cut])
    assert parts % 2**64 == whole
    assert exact.fingerprint(torch.cat([tensor, torch.zeros(64)])) == whole
    assert exact.fingerprint(tensor[torch.randperm(size)]) == whole
    changed = tensor.clone()
    changed[0] = torch.nextafter(changed[0], torch.tensor(math.inf))
    assert exact.fingerprint(changed) != whole


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 12), size=st.integers(1, 300))
def test_contributions_add_up_to_the_sum(seed: int, count: int, size: int) -> None:
    """What travels as float32 is what would have been added at once."""
    gradients = contributions_of(seed, count, size)
    maxima = torch.stack([g.abs().max() for g in gradients]).max().reshape(1)
    exponent = int(exact.next_exponents(maxima, count)[0])
    whole, recorded = summed(gradients, exponent, exact.Workspace())
    total, seen = torch.zeros(size, dtype=torch.float64), exact.new_maxima(1)
    for gradient in reversed(gradients):
        out_N = torch.full((size,), 7.0)
        exact.contribution(gradient, exponent, seen[0], out_N)
        total += out_N
    assert torch.equal(total, whole) and torch.equal(seen, recorded)
    untouched = torch.full((size,), 7.0)
    exact.contribution(gradients[0], None, exact.new_maxima(1)[0], untouched)
    assert torch.equal(untouched, torch.full((size,), 7.0)), "a probing pass has no scale"
