"""The parameters with which layers compute, where these are not there all the time: who comes, who goes, and
how many bytes are there at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from runtime.layout import Block


class Window(Protocol):
    """Sees to it that a layer has its parameters while it computes."""

    def enter(self, layer: int, following: int | None) -> None:
        """Before ``layer`` computes; ``following`` is the one that will come after it, if that is known.

        Raises Interrupted when the membership changes while it waits.
        """
        ...

    def leave(self, layer: int) -> None:
        """After ``layer`` has computed."""
        ...

    def renew(self) -> None:
        """The parameters have changed: what is there is out of date."""
        ...


class Residence:
    """``flats[block]`` is the vector that the layers' parameters are views of. It is one tensor for as long
    as the block is held, so that views and autograd graphs stay valid, but it has memory only while it is
    occupied (as in Zhao et al., "PyTorch FSDP", VLDB'23). Bytes are those of occupied vectors."""

    def __init__(self, device: torch.device) -> None:
        self.flats: dict[int, Tensor] = {}
        self.bytes = self.peak_bytes = 0
        self._device = device
        self._occupied: set[int] = set()

    def hold(self, wanted: Mapping[int, Block]) -> None:
        """These blocks from now on, all of them empty."""
        self.clear()
        for index in [index for index in self.flats if index not in wanted]:
            del self.flats[index]
        for index, block in wanted.items():
            if index not in self.flats:
                self.flats[index] = torch.empty(block.size, device=self._device)
                self.flats[index].untyped_storage().resize_(0)

    def occupy(self, block: int) -> Tensor:
        """The block's vector, with memory of unknown content where it had none."""
        flat_N = self.flats[block]
        if block not in self._occupied:
            self._occupied.add(block)
            size = flat_N.numel() * flat_N.element_size()
            flat_N.untyped_storage().resize_(size)
            self.bytes += size
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        return flat_N

    def vacate(self, block: int) -> None:
        """Gives the memory back."""
        if block in self._occupied:
            self._occupied.remove(block)
            self.bytes -= self.flats[block].untyped_storage().nbytes()
            self.flats[block].untyped_storage().resize_(0)

    def clear(self) -> None:
        """Empties all, once nothing is on its way any more."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for block in list(self._occupied):
            self.vacate(block)

    def take_peak(self) -> int:
        """The most bytes that were there at once since the last call."""
        peak, self.peak_bytes = self.peak_bytes, self.bytes
        return peak
