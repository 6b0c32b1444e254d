"""A model and data whose compute is emulated by sleeping, so that two cores can host many workers.

A sleeping layer leaves its core to others, as a layer on an accelerator would. What the bits are does not
matter here; that every message, sum and shard is real does.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BACKWARD = 2
"""A backward takes this many times its forward, half of it for the gradient of its input."""


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forward_seconds: float, backward_seconds: float) -> Tensor:
        ctx.seconds = backward_seconds
        if forward_seconds:
            time.sleep(forward_seconds)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradients[0], None, None


def slow_down(pace: Path, factors: Mapping[int, float]) -> None:
    """From now on the sleeping layers that were given the file ``pace`` sleep ``factors[process id]`` times
    as long in these processes. The file appears whole: layers read it at any time."""
    written = pace.with_suffix(".new")
    written.write_text(json.dumps({str(process): factor for process, factor in factors.items()}))
    written.replace(pace)


def _factor(pace: Path | None) -> float:
    """How much slower this process is at the moment. Tens of microseconds: a forward takes milliseconds."""
    if pace is None or not pace.exists():
        return 1.0
    return float(json.loads(pace.read_text()).get(str(os.getpid()), 1.0))


class SleepingLayer(nn.Module):
    """``x_BD`` to ``x_BD``: forward takes ``seconds``, backward twice that, both longer where the file
    ``pace`` says so. One parameter per column. The first layer of a model, of whose inputs nobody wants the
    gradient, takes all of it for its weights': so equal layers take equally long."""

    def __init__(self, width: int, seconds: float, pace: Path | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self._seconds = seconds
        self._pace = pace

    def forward(self, x_BD: Tensor) -> Tensor:
        seconds = self._seconds * _factor(self._pace)
        each = BACKWARD * seconds / 2
        # autograd asks either for its gradient, or for both: so a backward in two parts sleeps in both
        inputs_BD: Tensor = _Sleep.apply(x_BD, seconds, each)  # type: ignore[no-untyped-call]
        weights = each if x_BD.requires_grad else 2 * each
        scale_D: Tensor = _Sleep.apply(self.scale, 0.0, weights)  # type: ignore[no-untyped-call]
        return inputs_BD * scale_D


def loss(x_BD: Tensor, targets_BD: Tensor) -> tuple[Tensor, int]:
    """(the sum of the squared errors, number of samples)."""
    return (x_BD - targets_BD).square().sum(), len(x_BD)


class Noise:
    """Targets that are a fixed multiple of random inputs, a pure function of the micro-batch's place."""

    def __init__(self, width: int, micro_batch_size: int, seed: int) -> None:
        self._shape, self._seed = (micro_batch_size, width), seed

    def micro_batch(self, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        return self._draw(2 * (step * 10_007 + micro_batch))

    def held_out(self, micro_batch: int) -> tuple[Tensor, Tensor]:
        return self._draw(2 * micro_batch + 1)

    def _draw(self, place: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed((self._seed << 32) + place)
        inputs_BD = torch.randn(self._shape, generator=generator)
        return inputs_BD, inputs_BD / 2


def build(
    *,
    layers: int,
    forward_seconds: float,
    width: int = 64,
    pace: str | None = None,
    quick_ends: bool = False,
) -> tuple[list[nn.Module], Any]:
    """``layers`` sleeping layers and the loss; with ``quick_ends`` the first and the last one take no time.
    ``pace`` is a file for ``slow_down``, which need not be there yet. Raises ValueError for fewer than one
    layer."""
    if layers < 1:
        raise ValueError(f"the model's layers is {layers}: it must be at least 1")
    path = None if pace is None else Path(pace)
    quick = {0, layers - 1} if quick_ends else set()
    seconds = (0.0 if layer in quick else forward_seconds for layer in range(layers))
    return [SleepingLayer(width, each, path) for each in seconds], loss


def build_data(*, micro_batch_size: int, micro_batches: int, seed: int, width: int = 64) -> Noise:
    """Random inputs; ``micro_batches`` does not matter to them."""
    return Noise(width, micro_batch_size, seed)
