"""AdamW with warm-up and cosine decay, on slices of blocks.

Decoupled weight decay: Loshchilov and Hutter, ICLR 2019; cosine decay: the same, ICLR 2017. The
arithmetic is torch's fused kernel. On a slice cut at multiples of ``ALIGNMENT`` and never run
across a tensor's end it gives the bits that it gives on the whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@torch.no_grad()
def update(
    old_state: Tensor,
    new_state: Tensor,
    gradient_N: Tensor,
    parts: Sequence[Segment],
    step: int,
    settings: OptimizerSettings,
) -> None:
    """One AdamW step from ``old_state``, which stays as it is, into ``new_state``.

    Both states are float32 (3, N), rows parameters, exp_avg and exp_avg_sq; ``gradient_N`` is
    float32, already divided and clipped; ``step`` counts from 1. Padding is copied over.
    """
    assert old_state.shape == new_state.shape == (3, gradient_N.numel())
    new_state.copy_(old_state)
    steps_before = float(step - 1)  # the kernel itself adds the one
    for decays in (True, False):
        chosen = [part for part in parts if part.decays is decays]
        if not chosen:
            continue
        slices = [slice(part.start, part.stop) for part in chosen]
        adamw(
            [new_state[0, s] for s in slices],
            [gradient_N[s] for s in slices],
            [new_state[1, s] for s in slices],
            [new_state[2, s] for s in slices],
            [],
            [torch.tensor(steps_before, device=new_state.device) for _ in slices],
            fused=True,
            amsgrad=False,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            lr=settings.rate(step),
            weight_decay=settings.weight_decay if decays else 0.0,
            eps=settings.eps,
            maximize=False,
        )
