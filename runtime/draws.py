"""Dropout's draws on a CPU: torch's own bits, in four fifths of the time that torch takes for them.

torch draws the numbers of ``Tensor.bernoulli_``, and with it dropout's, one by one: two words of its
Mersenne Twister make a number in [0, 1), which is compared with the probability (``bernoulli_distribution``
of ATen/core/DistributionsHelper.h, ``uniform_real`` of ATen/core/TransformationHelper.h). That is a sixth of
the processor time in which a small transformer trains. Here the same words are drawn as integers and compared
by vector instructions; the generator is left as torch would leave it.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor

_BITS = 53
"""torch makes a number of so many low bits of two words."""

_DRAWN_TOGETHER = 1 << 15
"""Numbers; their words take 256 KiB, which a core's own cache holds beside the numbers themselves."""

_FEWEST = 1 << 14
"""Numbers; for fewer, the calls from Python take longer than is saved."""

_registered: list[torch.library.Library] = []


def draw_in_vectors() -> bool:
    """Makes torch draw as ``bernoulli_`` does, in this whole process. Returns whether it does so now: it
    stays as it was where torch draws other numbers (on Intel's processors, by MKL)."""
    if not _registered:
        if not _is_torchs_own():
            return False
        library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a kernel of torch's is replaced: it shall be
            library.impl("bernoulli_.float", bernoulli_, "CPU")  # type: ignore[no-untyped-call]
        _registered.append(library)  # torch's own kernel comes back when it is deleted
    return True


def bernoulli_(target: Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> Tensor:
    """Fills ``target`` (any shape and dtype, on a CPU) with ones, of probability ``p``, and zeros.

    Of one thread at a time: between two blocks others could draw from ``generator`` (None: torch's default).
    Raises RuntimeError, as torch does, unless ``p`` is in [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise RuntimeError(f"bernoulli_ expects p to be in [0, 1], but got p={p}")
    if target.numel() < _FEWEST or not target.is_contiguous():
        # this overload is torch's own still, and draws the same numbers
        return target.bernoulli_(torch.tensor(p, dtype=torch.float64), generator=generator)
    below = math.ceil(p * (1 << _BITS))  # exact: a double times a power of two
    flat = target.detach().view(-1)
    size = flat.numel()
    values = None if flat.dtype is torch.bfloat16 else flat.numpy()  # NumPy does not know it
    words = torch.empty(min(size, _DRAWN_TOGETHER), dtype=torch.int64)
    drawn = words.numpy()
    ones = np.empty(len(drawn), np.bool_)
    for begin in range(0, size, _DRAWN_TOGETHER):
        count = min(size - begin, _DRAWN_TOGETHER)
        if count < len(drawn):
            words, drawn, ones = words[:count], drawn[:count], ones[:count]
        words.random_(generator=generator)
        np.bitwise_and(drawn, (1 << _BITS) - 1, out=drawn)
        np.less(drawn, below, out=ones)
        if values is None:
            flat[begin : begin + count].copy_(torch.from_numpy(ones))
        else:
            np.copyto(values[begin : begin + count], ones)
    return target


def _is_torchs_own() -> bool:
    """Whether torch, of the same generator, draws the same numbers and leaves it alike."""
    theirs, ours = (torch.Generator().manual_seed(1) for _ in range(2))
    return all(
        torch.equal(
            torch.empty(_FEWEST).bernoulli_(p, generator=theirs),
            bernoulli_(torch.empty(_FEWEST), p, generator=ours),
        )
        and torch.equal(theirs.get_state(), ours.get_state())
        for p in (0.1, 0.9)
    )
