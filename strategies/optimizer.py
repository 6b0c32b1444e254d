"""AdamW with warm-up and cosine decay, on slices of blocks.

Decoupled weight decay: Loshchilov and Hutter, ICLR 2019; cosine decay: the same, ICLR 2017. The
arithmetic is torch's fused kernel. On a slice cut at multiples of ``ALIGNMENT`` and never run
across a tensor's end it gives the bits that it gives on the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from runtime.layout import ALIGNMENT, Block, TensorSpec


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """What AdamW needs. Raises ValueError where a value makes no sense.

    The rate rises linearly over ``warmup_steps`` to ``learning_rate`` and then falls along a
    cosine to ``minimum_rate * learning_rate`` at step ``decay_steps``, where it stays; with
    ``decay_steps`` None it stays at ``learning_rate``. ``clip_norm`` None: no clipping.
    """

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 0
    decay_steps: int | None = None
    minimum_rate: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.learning_rate >= 0 or not self.eps > 0 or not self.weight_decay >= 0:
            raise ValueError("learning_rate and weight_decay must not be negative, eps must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        if not 0 <= self.minimum_rate <= 1:
            raise ValueError("minimum_rate is a share of learning_rate: choose 0 to 1")
        if self.warmup_steps < 0 or (self.decay_steps is not None and self.decay_steps < self.warmup_steps):
            raise ValueError("warmup_steps must not be negative, nor exceed decay_steps")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError("clip_norm must be positive; leave it out for no clipping")

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, counted from 1."""
        assert step >= 1, "steps count from 1"
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.decay_steps is None:
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.decay_steps - self.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * (self.minimum_rate + (1.0 - self.minimum_rate) * cosine)


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements ``start`` to ``stop - 1`` of a shard: its part of one tensor, padding left out."""

    tensor: TensorSpec
    start: int
    stop: int

    @property
    def decays(self) -> bool:
        return self.tensor.decays


def segments(block: Block, start: int, stop: int) -> tuple[Segment, ...]:
    """The tensors' parts in elements ``start`` to ``stop - 1`` of ``block``, relative to ``start``."""
    assert 0 <= start <= stop <= block.size
    assert start % ALIGNMENT == 0 and (stop % ALIGNMENT == 0 or stop == block.size)
    return tuple(
        Segment(tensor, max(tensor.offset, start) - start, min(tensor.stop, stop) - start)
        for tensor in block.tensors
        if max(tensor.offset, start) < min(tensor.stop, stop)
    )


class Update(NamedTuple):
    """A shard's states before and after a step, float32 (3, N) with rows parameters, exp_avg and exp_avg_sq,
    its gradient, float32 (N), divided and clipped, and its ``parts``."""

    old_state: Tensor
    new_state: Tensor
    gradient_N: Tensor
    parts: Sequence[Segment]


@torch.no_grad()
def update(shards: Sequence[Update], step: int, settings: OptimizerSettings) -> None:
    """One AdamW step of each of ``shards`` from its old state, which stays as it is, into the new one.

    ``step`` counts from 1. Padding is copied over. All at once, since a call takes as long as a few thousand
    elements do.
    """
    for shard in shards:
        assert shard.old_state.shape == shard.new_state.shape == (3, shard.gradient_N.numel())
        shard.new_state.copy_(shard.old_state)
    steps_before = float(step - 1)  # the kernel itself adds the one
    for decays in (True, False):
        chosen = [
            (shard, slice(part.start, part.stop))
            for shard in shards
            for part in shard.parts
            if part.decays is decays
        ]
        if not chosen:
            continue
        adamw(
            [shard.new_state[0, s] for shard, s in chosen],
            [shard.gradient_N[s] for shard, s in chosen],
            [shard.new_state[1, s] for shard, s in chosen],
            [shard.new_state[2, s] for shard, s in chosen],
            [],
            [torch.tensor(steps_before, device=shard.new_state.device) for shard, _ in chosen],
            fused=True,
            amsgrad=False,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            lr=settings.rate(step),
            weight_decay=settings.weight_decay if decays else 0.0,
            eps=settings.eps,
            maximize=False,
        )
