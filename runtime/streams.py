"""Random streams and sample order as pure functions of their place in the run.

Nothing here depends on ranks, on the number of workers or on how many numbers were drawn before,
so any worker that computes micro-batch m at layer l of step t draws the same numbers.
Steps count from 1: step t turns version t - 1 of the parameters into version t.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch

_MASK = (1 << 64) - 1
_ROUNDS = 8


def stream_key(*parts: int | str) -> int:
    """A 63-bit key of the parts: the same on every machine, different for different parts."""
    text = ",".join(f"s{len(part)}:{part}" if isinstance(part, str) else f"i{int(part)}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_layer(
    seed: int, step: int, micro_batch: int, layer: int, device: torch.device, part: tuple[int, ...] = ()
) -> None:
    """Seeds torch's default generators for one forward pass of one layer, or of a ``part`` of it.

    The CPU generator, and on a GPU that device's too. (torch's CPU generator uses the low 32 bits
    of a key only: two places in a long run may share a stream, which does no harm.)
    """
    key = stream_key(seed, step, micro_batch, layer, *part)
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(key)


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(stream_key("sample order", seed, epoch, number) for number in range(_ROUNDS))


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): 64 bits to 64 bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permuted(position: int, size: int, seed: int, epoch: int) -> int:
    """Where ``position`` goes in the permutation of ``range(size)`` named by (seed, epoch).

    A balanced Feistel network over the least even number of bits that covers ``size``, walked
    along its cycle until it is back in range: a bijection that needs no table (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Fewer than four walks on average.
    """
    assert 0 <= position < size
    half = max(1, -(-(size - 1).bit_length() // 2))
    mask = (1 << half) - 1
    keys = _round_keys(seed, epoch)
    while True:
        left, right = position >> half, position & mask
        for key in keys:
            left, right = right, left ^ (_mix((right + key) & _MASK) & mask)
        position = left << half | right
        if position < size:
            return position


def permutation(size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """``permuted`` of every position at once: int64, [size]."""
    half = max(1, -(-(size - 1).bit_length() // 2))
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    keys = [np.uint64(key) for key in _round_keys(seed, epoch)]
    found = np.arange(size, dtype=np.uint64)
    outside = np.arange(size)
    while outside.size:
        position = found[outside]
        left, right = position >> bits, position & mask
        for key in keys:
            left, right = right, left ^ (_mix_all(right + key) & mask)
        found[outside] = position = left << bits | right
        outside = outside[position >= size]
    return found.astype(np.int64)


def _mix_all(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """``_mix`` of each; numpy's uint64 wraps around by itself."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class SampleOrder:
    """Which of ``samples`` samples make up a micro-batch: random access, reshuffled every epoch.

    An epoch has ``samples // (micro_batches * micro_batch_size)`` steps; the samples left over
    are dropped, other ones each epoch. Raises ValueError if there are not enough for one step.
    """

    __slots__ = ("micro_batch_size", "micro_batches", "seed", "size")

    def __init__(self, seed: int, samples: int, micro_batch_size: int, micro_batches: int) -> None:
        if micro_batch_size < 1 or micro_batches < 1:
            raise ValueError("micro_batch_size and micro_batches must be at least 1")
        if samples < micro_batches * micro_batch_size:
            raise ValueError(
                f"one step takes {micro_batches * micro_batch_size} samples ({micro_batches} "
                f"micro-batches of {micro_batch_size}) but there are {samples}: lower "
                "micro_batches or micro_batch_size, or add data"
            )
        self.seed = seed
        self.size = samples
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches

    @property
    def global_batch(self) -> int:
        """Samples a step."""
        return self.micro_batches * self.micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self.size // self.global_batch

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that ``step``, from 1, belongs to."""
        assert step >= 1, "steps count from 1"
        return (step - 1) // self.steps_per_epoch

    def samples(self, step: int, micro_batch: int) -> tuple[int, ...]:
        """The ids, in ``range(size)``, of the samples of one micro-batch."""
        assert 0 <= micro_batch < self.micro_batches
        epoch = self.epoch(step)
        first = ((step - 1) % self.steps_per_epoch) * self.global_batch
        first += micro_batch * self.micro_batch_size
        return tuple(
            permuted(position, self.size, self.seed, epoch)
            for position in range(first, first + self.micro_batch_size)
        )
