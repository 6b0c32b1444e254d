"""What the recipes of toy runs name. Workers on Ray import this to build it, so it imports little."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
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


class Heavy(nn.Module):
    """Computes what ``layer`` does. While there is a file "heavy" in ``folder``, moving it to a device takes
    ``seconds``, as it does with many parameters; a file named by the process says that it began."""

    def __init__(self, layer: nn.Module, folder: Path, seconds: float) -> None:
        super().__init__()
        self.layer = layer
        self._folder, self._seconds = folder, seconds

    def forward(self, value: Tensor) -> Tensor:
        computed: Tensor = self.layer(value)
        return computed

    def _apply(self, change: Callable[..., Any], recurse: bool = True) -> Any:
        if (self._folder / "heavy").exists():
            (self._folder / str(os.getpid())).touch()
            time.sleep(self._seconds)
        return super()._apply(change, recurse)  # type: ignore[no-untyped-call]


def build_heavy(folder: str, seconds: float) -> tuple[list[nn.Module], Any]:
    """The toy model, with a first layer that can be heavy."""
    (first, *others), loss = build_steady()
    return [Heavy(first, Path(folder), seconds), *others], loss
