"""Exact, order-free sums: gradients, their norm and parameter fingerprints.

Floating-point addition is not associative; integer addition is. A gradient g becomes the integer
``round(g * 2^s)``, held in float64, where every sum below 2^53 is exact. So any order, grouping
or slicing of the additions gives the same bits. The exponent s of each tensor follows from the
largest |g| of the step before (a maximum is order-free too) and leaves room for every
contribution of a step and for growth from one step to the next.

The approach is that of Demmel and Nguyen, "Parallel Reproducible Summation" (IEEE Transactions on
Computers 64(7), 2015), with one pre-agreed bin per tensor.

Vocabulary: a *contribution* is one gradient tensor from one micro-batch and one layer, so a
tensor that L layers share gets micro-batches x L contributions a step. *Maxima* are float32
vectors with one slot a tensor (by ``TensorSpec.index``), exponents are integers in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ACCUMULATOR_BITS = 52
"""A sum's magnitude stays within 2^52; float64 holds integers exactly up to 2^53."""

GROWTH_BITS = 6
"""Gradients may grow by 2^6 from one step to the next before the step has to be redone."""

EXPONENT_LIMIT = 120
"""Exponents lie within +-120, so that 2^s and 2^-s are normal float32 numbers."""

_CHUNK_CPU = 1 << 17
_CHUNK_ONE_THREAD = 1 << 15  # with its sums it fits into 1 MiB of cache, which two threads may share
_CHUNK_GPU = 1 << 22

_NORM_CHUNK_CPU = 1 << 15  # with its three parts it stays in a core's cache
_NORM_CHUNK_GPU = 1 << 17  # exactness allows no more
_DOT_CHUNK = 1 << 16


class Workspace:
    """Scratch memory for ``accumulate`` on one device; for one thread at a time.

    Elements are handled in chunks that stay in a core's cache (128 to 512 KiB on a CPU), because three
    passes over main memory would cost three times as much. ``scale`` keeps the powers of two that it has
    made: torch multiplies a small tensor by a tensor in half of the time that it takes by a number.

    Where torch computes with one thread, NumPy does the same in 0.7 of the time: to add float32 to float64
    torch makes a float64 copy of all the elements first, NumPy of some thousand at a time.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        on_cpu = self.device.type == "cpu"
        self.by_numpy = on_cpu and torch.get_num_threads() == 1
        self.chunk = _CHUNK_ONE_THREAD if self.by_numpy else _CHUNK_CPU if on_cpu else _CHUNK_GPU
        self.scratch = torch.empty(self.chunk, dtype=torch.float32, device=self.device)
        self._scales: dict[int, Tensor] = {}

    def scale(self, exponent: int) -> Tensor:
        """2^exponent, within +-``EXPONENT_LIMIT``, as a 0-dimensional float32 tensor."""
        found = self._scales.get(exponent)
        if found is None:
            made = torch.tensor(math.ldexp(1.0, exponent), dtype=torch.float32, device=self.device)
            found = self._scales[exponent] = made
        return found


def new_maxima(tensors: int, device: torch.device | str = "cpu") -> Tensor:
    """The maxima of a step that has seen no contribution yet: zeros, float32, one a tensor."""
    return torch.zeros(tensors, dtype=torch.float32, device=device)


def accumulate(
    accumulator_N: Tensor,
    gradient: Tensor,
    exponent: int | None,
    maximum: Tensor,
    workspace: Workspace,
    *,
    first: bool = False,
) -> None:
    """Adds ``round(gradient * 2^exponent)`` and raises ``maximum`` to the largest |gradient|.

    ``accumulator_N`` is flat, contiguous float64; ``gradient`` has N elements of any floating
    type, shape and strides; ``maximum`` is a 0-dimensional float32 view into the maxima. Nothing
    waits for the device. With ``exponent`` None (a probing pass) only the maximum is recorded. The ``first``
    contribution overwrites whatever lies in the accumulator: the bits are those of adding to zeros.

    Scaling by a power of two and rounding (to nearest, ties to even) are exact in float32: a
    float32 number of 2^23 or more is an integer already. NaN and infinity end up in ``maximum``.
    """
    assert accumulator_N.numel() == gradient.numel(), "an accumulator per gradient, of the same size"
    if gradient.numel() == 0:
        return
    gradient_N = _noted(gradient, maximum)
    if exponent is None:
        return
    if workspace.by_numpy:
        _accumulate_by_numpy(accumulator_N, gradient_N, exponent, workspace, first)
        return
    scale = workspace.scale(exponent)
    if gradient_N.numel() <= workspace.chunk:  # most tensors: spared the cost of two splits
        _add_scaled(accumulator_N, gradient_N, scale, workspace.scratch[: gradient_N.numel()], first)
        return
    chunks_N = torch.split(accumulator_N, workspace.chunk), torch.split(gradient_N, workspace.chunk)
    for sums, part in zip(*chunks_N, strict=True):
        _add_scaled(sums, part, scale, workspace.scratch[: part.numel()], first)


def _noted(gradient: Tensor, maximum: Tensor) -> Tensor:
    """``gradient`` flat and in float32, after raising ``maximum`` to the largest magnitude in it."""
    gradient_N = gradient.detach().reshape(-1).to(torch.float32)
    lowest, highest = torch.aminmax(gradient_N)
    torch.maximum(maximum, highest, out=maximum)
    torch.maximum(maximum, lowest.neg_(), out=maximum)
    return gradient_N


def contribution(gradient: Tensor, exponent: int | None, maximum: Tensor, out_N: Tensor) -> None:
    """What ``accumulate`` would add, into ``out_N`` (float32, flat): an integer that is rounded in float32
    fits into one, so that a contribution travels in half of a sum's bytes. ``maximum`` is raised as there;
    with ``exponent`` None nothing else is done.
    """
    if gradient.numel() == 0:
        return
    gradient_N = _noted(gradient, maximum)
    if exponent is not None:
        torch.mul(gradient_N, math.ldexp(1.0, exponent), out=out_N).round_()


def _add_scaled(sums: Tensor, part: Tensor, scale: Tensor, scratch: Tensor, first: bool) -> None:
    torch.mul(part, scale, out=scratch).round_()
    if first:
        sums.copy_(scratch.add_(0.0))  # -0.0 becomes 0.0, as it would by adding it to 0.0
    else:
        sums.add_(scratch)


def _accumulate_by_numpy(
    accumulator_N: Tensor, gradient_N: Tensor, exponent: int, workspace: Workspace, first: bool
) -> None:
    """As chunks of ``_add_scaled``, and the same bits."""
    chunk, scratch = workspace.chunk, workspace.scratch.numpy()
    sums_N, parts_N = accumulator_N.numpy(), gradient_N.numpy()
    scale = math.ldexp(1.0, exponent)  # a float does not widen a float32 array
    with np.errstate(all="ignore"):  # what is too large shows in the maximum
        for begin in range(0, len(parts_N), chunk):
            sums, part = sums_N[begin : begin + chunk], parts_N[begin : begin + chunk]
            scaled = scratch[: len(part)]
            np.rint(np.multiply(part, scale, out=scaled), out=scaled)
            if first:
                np.add(scaled, 0.0, out=sums)  # see ``_add_scaled``
            else:
                np.add(sums, scaled, out=sums)


@torch.no_grad()
def accumulate_fast(accumulator_N: Tensor, gradient: Tensor, *, first: bool = False) -> None:
    """Adds in float32: quicker, but the bits depend on the order of the additions. ``first`` as in
    ``accumulate``.

    NaN and infinity stay in the sum and so show in the gradient norm.
    """
    if first:
        torch.add(gradient.reshape(-1), 0.0, out=accumulator_N)
    else:
        accumulator_N.add_(gradient.reshape(-1))


@torch.no_grad()
def squared_norm_fast(sums_N: Tensor) -> float:
    """The sum of squares of flat float32 sums: chunk by chunk in float32, the chunks in float64."""
    dots = [part.dot(part) for part in torch.split(sums_N, _DOT_CHUNK)]
    return float(torch.stack(dots).sum(dtype=torch.float64))


def _sum_bits(contributions: int | Sequence[int], tensors: int) -> Tensor:
    """How many bits the sum of that many terms may be longer than its largest: ceil(log2(n))."""
    counts = [contributions] * tensors if isinstance(contributions, int) else contributions
    assert len(counts) == tensors and all(count >= 1 for count in counts)
    return torch.tensor([(count - 1).bit_length() for count in counts], dtype=torch.int64)


def next_exponents(maxima_T: Tensor, contributions: int | Sequence[int]) -> Tensor:
    """The exponents (int64, T) for the step after one with these maxima.

    ``contributions`` is a step's count for every tensor, or one count a tensor. The largest
    gradient seen lands below 2^(52 - ceil(log2(contributions)) - 6). A tensor whose gradients
    were all zero is treated as if the largest had been below one. Maxima must be finite: see
    ``first_non_finite``.
    """
    maxima_T = maxima_T.detach().cpu().to(torch.float64)
    assert bool(torch.isfinite(maxima_T).all()), "exponents follow from finite gradients only"
    magnitude_T = torch.frexp(maxima_T).exponent.to(torch.int64)
    room_T = ACCUMULATOR_BITS - GROWTH_BITS - _sum_bits(contributions, maxima_T.numel())
    return (room_T - magnitude_T).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)


def overflowed(maxima_T: Tensor, exponents_T: Tensor, contributions: int | Sequence[int]) -> bool:
    """Whether a sum of this step may have left the exact range, so that the step must be redone.

    True if some ``maximum * 2^exponent`` reaches 2^(52 - ceil(log2(contributions))). Redone with
    ``next_exponents(maxima_T, contributions)`` it cannot overflow again. Maxima must be finite.
    """
    maxima_T = maxima_T.detach().cpu().to(torch.float64)
    assert bool(torch.isfinite(maxima_T).all()), "a non-finite gradient is not an overflow"
    magnitude_T = torch.frexp(maxima_T).exponent.to(torch.int64)
    limit_T = ACCUMULATOR_BITS - _sum_bits(contributions, maxima_T.numel())
    beyond_T = (magnitude_T + exponents_T.cpu() > limit_T) & (maxima_T > 0)
    return bool(beyond_T.any())


def first_non_finite(maxima_T: Tensor) -> int | None:
    """The index of the first tensor with a NaN or infinite gradient, or None."""
    indices = (~torch.isfinite(maxima_T)).nonzero()
    return int(indices[0]) if indices.numel() else None


def squared_norm(accumulator_N: Tensor) -> int:
    """The sum of squares of the integers in a flat float64 accumulator, exactly; see ``squared_norms``."""
    return squared_norms(accumulator_N, [(0, accumulator_N.numel())])[0]


@torch.no_grad()
def squared_norms(accumulator_N: Tensor, bounds: Sequence[tuple[int, int]]) -> list[int]:
    """The sums of squares of the integers in elements ``start`` to ``stop - 1`` of a flat float64
    accumulator, exactly, for each (start, stop) of ``bounds``.

    Slices of one tensor add up to the whole as Python integers, however it was cut. Padding
    (zeros) adds nothing. Each integer (magnitude up to 2^53) is split at bits 18 and 36 into
    three signed parts of at most 2^17; then a dot product of up to 2^17 products of parts stays
    within 2^51, exact in float64 in whatever order the library adds.
    """
    size = accumulator_N.numel()
    chunk = _NORM_CHUNK_CPU if accumulator_N.device.type == "cpu" else _NORM_CHUNK_GPU
    parts_3N = accumulator_N.new_empty((3, min(size, chunk)))
    places: list[int] = []
    products: list[Tensor] = []
    for begin in range(0, size, chunk):
        whole = accumulator_N[begin : begin + chunk]
        high, middle, low = parts_3N[:, : whole.numel()]
        torch.mul(whole, 2.0**-36, out=high).round_()
        torch.sub(whole, high, alpha=2.0**36, out=low)
        torch.mul(low, 2.0**-18, out=middle).round_()
        low.sub_(middle, alpha=2.0**18)
        for place, (start, stop) in enumerate(bounds):
            first, end = max(start - begin, 0), min(stop - begin, whole.numel())
            if first < end:
                part_3N = parts_3N[:, first:end]
                products.append(torch.mm(part_3N, part_3N.t()))
                places.append(place)
    totals = [0] * len(bounds)
    if not products:
        return totals
    # one transfer from the device; high x high, high x middle (twice), and so on
    weights = (1 << 72, 1 << 55, 1 << 37, 0, 1 << 36, 1 << 19, 0, 0, 1)
    for place, values in zip(places, torch.stack(products).flatten(1).tolist(), strict=True):
        totals[place] += sum(int(value) * weight for value, weight in zip(values, weights, strict=True))
    return totals


def combine_squared_norms(squared_norms: Sequence[int], exponents: Sequence[int]) -> float:
    """The squared norm of the un-normalised gradient sum over all tensors, rounded once.

    ``squared_norms[i]`` is tensor i's ``squared_norm`` summed over all its slices, in units of
    ``4^-exponents[i]``. The sum is an exact integer, so it does not depend on any order. Divide
    the root by the count of samples (or tokens) for the norm of the mean gradient.
    """
    assert len(squared_norms) == len(exponents)
    if not squared_norms:
        return 0.0
    finest = max(exponents)
    total = sum(n << 2 * (finest - s) for n, s in zip(squared_norms, exponents, strict=True))
    return math.ldexp(float(total), -2 * finest)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """The factor of ``torch.nn.utils.clip_grad_norm_``: ``min(1, max_norm / (norm + 1e-6))``."""
    return min(1.0, max_norm / (norm + 1e-6))


@torch.no_grad()
def mean_gradient(
    accumulator_N: Tensor, exponent: int, multiplier: float, out: Tensor | None = None
) -> Tensor:
    """``accumulator * 2^-exponent * multiplier`` as float32 (N), into ``out`` if given.

    ``multiplier`` is clip coefficient / count. Each element is rounded to float64 and then to
    float32, by itself, so slices have the bits of the whole.
    """
    factor = math.ldexp(multiplier, -exponent)
    if out is None:
        out = torch.empty_like(accumulator_N, dtype=torch.float32)
    return torch.mul(accumulator_N, factor, out=out)


@torch.no_grad()
def fingerprint(tensor: Tensor) -> int:
    """The sum of a contiguous float32 tensor's bit patterns, modulo 2^64.

    Fingerprints of parts add up (modulo 2^64) to that of the whole; zeros add nothing. It tells
    runs apart that differ by rounding; it is no defence against a forger.
    """
    return int(tensor.detach().view(torch.int32).sum(dtype=torch.int64)) % (1 << 64)
