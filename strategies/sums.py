"""The sums of the held layers' gradients over a step's micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from runtime.exact import Workspace, accumulate, accumulate_fast, new_maxima
from runtime.layout import Block, Layout


class GradientSums:
    """``accumulators[block]`` is flat, as the block's parameters are: float64 where sums are ``exact``, else
    float32. What they hold is told by ``summed``: memory that nothing was added to yet is not cleared until
    then, for the first gradient overwrites it. ``maxima_T`` has the largest |gradient| of every tensor of the
    model (exact sums only)."""

    def __init__(self, layout: Layout, device: torch.device, *, exact: bool) -> None:
        self.device = device
        self.accumulators: dict[int, Tensor] = {}
        self.maxima_T = new_maxima(len(layout.tensors), device)
        self._exact = exact
        self._workspace = Workspace(device)
        # what every micro-batch asks for, made once
        self._maximum = self.maxima_T.unbind()
        self._parts: dict[tuple[int, int], Tensor] = {}
        self._blank: set[tuple[int, int]] = set()  # whatever lies there counts as zeros
        self._used = [
            tuple(dict.fromkeys((use.block, use.tensor.index) for use in layout.uses_of(layer)))
            for layer in range(layout.layers)
        ]

    def hold(self, blocks: Mapping[int, Block]) -> None:
        """Has memory for the gradients of ``blocks`` from now on: what is among ``accumulators`` stays as it
        is, who made it ready included, and what is not holds zeros."""
        for index in [index for index in self.accumulators if index not in blocks]:
            del self.accumulators[index]
        self._parts = {key: part for key, part in self._parts.items() if key[0] in blocks}
        self._blank &= self._parts.keys()
        divided = {index for index, _ in self._parts}
        for index, block in sorted(blocks.items()):
            if index not in self.accumulators:
                dtype = torch.float64 if self._exact else torch.float32
                self.accumulators[index] = torch.zeros(block.size, dtype=dtype, device=self.device)
            if index not in divided:
                flat = self.accumulators[index]
                self._parts |= {(index, each.index): flat[each.offset : each.stop] for each in block.tensors}

    def clear(self) -> None:
        """Sums of nothing, and no maxima."""
        self._blank = set(self._parts)
        self.maxima_T.zero_()

    def summed(self) -> dict[int, Tensor]:
        """``accumulators``, with zeros where nothing was added."""
        for key in self._blank:
            self._parts[key].zero_()
        self._blank.clear()
        return self.accumulators

    def add(self, layer: int, gradients: Sequence[Tensor | None], exponents: Sequence[int] | None) -> None:
        """Adds the gradients of ``layer``'s parameters, in the order of their first use; None where there is
        none. ``exponents`` has the scale of every tensor of the model (``runtime.exact.accumulate``)."""
        for key, gradient in zip(self._used[layer], gradients, strict=True):
            if gradient is None:
                continue
            total, index, first = self._parts[key], key[1], key in self._blank
            gradient = gradient.to(self.device)
            if not self._exact:
                accumulate_fast(total, gradient, first=first)
            else:
                exponent = None if exponents is None else exponents[index]
                maximum = self._maximum[index]
                accumulate(total, gradient, exponent, maximum, self._workspace, first=first)
                if exponent is None:
                    continue
            self._blank.discard(key)
