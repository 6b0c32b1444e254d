"""AdamW with warm-up and cosine decay, on slices of blocks.

Decoupled weight decay: Loshchilov and Hutter, ICLR 2019; cosine decay: the same, ICLR 2017. The
arithmetic is torch's fused kernel. On a slice cut at multiples of ``ALIGNMENT`` and never run
across a tensor's end it gives the bits that it gives on the whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from runtime.layout import ALIGNMENT, Block, TensorSpec
from strategies.options import OptimizerSettings


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
