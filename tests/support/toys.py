"""What the recipes of toy runs name. Workers on Ray import this to build it, so it imports little."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor, nn

from tests.support.models import Tokens, build


def build_tokens(micro_batch_size: int, micro_batches: int, seed: int) -> Tokens:
    """The recipe's data builder."""
    return Tokens(5, micro_batch_size)


class PacedTokens(Tokens):
    """The same tokens; reading a micro-batch takes time, and leaves the processor to others."""

    def __init__(self, seed: int, micro_batch_size: int, seconds: float) -> None:
        super().__init__(seed, micro_batch_size)
        self._seconds = seconds

    def micro_batch(self, step: int, micro_batch: int) -> Any:
        time.sleep(self._seconds)
        return super().micro_batch(step, micro_batch)


def build_paced_tokens(micro_batch_size: int, micro_batches: int, seed: int, seconds: float) -> PacedTokens:
    """The recipe's data builder where a run is to last as long as a test needs it."""
    return PacedTokens(5, micro_batch_size, seconds)


class Steady(nn.Module):
    """Computes what ``layer`` does, in a millisecond at least."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, value: Tensor) -> Tensor:
        time.sleep(1e-3)
        computed: Tensor = self.layer(value)
        return computed


def build_steady() -> tuple[list[nn.Module], Any]:
    """The toy model, of layers whose seconds hardly vary."""
    layers, loss = build()
    return [Steady(layer) for layer in layers], loss
