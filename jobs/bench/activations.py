"""Counts the bytes that layers keep from forward to backward, by wrapping them. For measuring runs only.

A storage counts once however many tensors view it; parameters and buffers do not count. What counts is
what autograd saves and the inputs and outputs of layers, for as long as anybody holds them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from jobs.builders import build_layers
from strategies.boundary import flatten


class Meter:
    """Bytes kept now and at most, in this process. ``on_peak`` is told of every new maximum."""

    def __init__(self, on_peak: Callable[[int], None] | None = None) -> None:
        self.bytes = 0
        self.peak = 0
        self._holds: dict[int, list[int]] = {}
        self._on_peak = on_peak

    def hold(self, tensor: Tensor) -> int:
        """Counts a reference to the tensor's storage; returns what ``release`` needs."""
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        count = self._holds.setdefault(place, [0, size])
        if count[0] == 0:
            self.bytes += size
            if self.bytes > self.peak:
                self.peak = self.bytes
                if self._on_peak is not None:
                    self._on_peak(self.peak)
        count[0] += 1
        return place

    def release(self, place: int) -> None:
        count = self._holds[place]
        count[0] -= 1
        if count[0] == 0:
            self.bytes -= count[1]
            del self._holds[place]


class _Saved:
    """A tensor that autograd saved. It goes when its graph goes."""

    def __init__(self, tensor: Tensor, meter: Meter) -> None:
        # detached: an output would hold the graph that holds it
        self.tensor, self._meter = tensor.detach(), meter
        self._place = meter.hold(tensor)

    def __del__(self) -> None:
        self._meter.release(self._place)


class MeteredLayer(nn.Module):
    """``layer`` with every byte counted that it keeps for its backward."""

    def __init__(self, layer: nn.Module, meter: Meter) -> None:
        super().__init__()
        self.layer = layer
        self._meter = meter

    def forward(self, value: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.layer(value)
        constants = {tensor.untyped_storage().data_ptr() for tensor in [*self.parameters(), *self.buffers()]}

        def pack(tensor: Tensor) -> Tensor | _Saved:
            if tensor.untyped_storage().data_ptr() in constants:
                return tensor
            return _Saved(tensor, self._meter)

        with saved_tensors_hooks(pack, lambda kept: kept.tensor if isinstance(kept, _Saved) else kept):
            output = self.layer(value)
        for tensor in [*flatten(value)[0], *flatten(output)[0]]:
            weakref.finalize(tensor, self._meter.release, self._meter.hold(tensor)).atexit = False
        return output


def meter(layers: list[nn.Module], meter: Meter) -> list[nn.Module]:
    """The layers, counted by ``meter``."""
    return [MeteredLayer(layer, meter) for layer in layers]


def build(*, of: str, folder: str, **arguments: Any) -> tuple[list[nn.Module], Any]:
    """The model that the builder ``of`` makes, metered; the peak goes to a file named by the process id
    in ``folder``."""
    path = Path(folder) / str(os.getpid())
    layers, loss = build_layers(of, arguments)
    return meter(layers, Meter(lambda peak: _write(path, peak))), loss


def _write(path: Path, peak: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(peak), encoding="utf-8")


def read_peak(folder: Path, process: int) -> int:
    """The peak that the process ``process`` wrote."""
    return int((folder / str(process)).read_text(encoding="utf-8"))
