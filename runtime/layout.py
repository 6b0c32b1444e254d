"""How a model's parameters lie in memory: blocks of flat, aligned tensors.

A *block* is the unit that is sharded, reduced and gathered: the parameters of one layer, or one
parameter that several layers share (a tied embedding). Inside a block every tensor starts at a
multiple of ``ALIGNMENT`` elements, so a slice of a block that is cut at such multiples runs
through the same vector instructions as the whole tensor does and gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

ALIGNMENT = 64
"""Elements. Tensors start, and slices are cut, at multiples of this."""


def aligned(elements: int) -> int:
    """The smallest multiple of ``ALIGNMENT`` that is not below ``elements``."""
    return -(-elements // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One parameter tensor inside a block.

    ``index`` counts tensors over the whole model and is the tensor's place in every per-tensor
    vector (scales, largest gradients); ``offset`` is in elements from the start of the block.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    offset: int
    decays: bool

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def stop(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class Block:
    """Flat parameters: ``size`` elements, padding included, used by ``layers`` (ascending)."""

    index: int
    name: str
    layers: tuple[int, ...]
    tensors: tuple[TensorSpec, ...]
    size: int


@dataclass(frozen=True, slots=True)
class ParameterUse:
    """Layer ``layer`` knows the tensor ``tensor`` of block ``block`` by the name ``name``."""

    layer: int
    name: str
    block: int
    tensor: TensorSpec


@dataclass(frozen=True)
class Layout:
    """The blocks of a model and which layer uses what."""

    layers: int
    blocks: tuple[Block, ...]
    uses: tuple[ParameterUse, ...]

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the model, by ``TensorSpec.index``."""
        tensors = (tensor for block in self.blocks for tensor in block.tensors)
        return tuple(sorted(tensors, key=lambda tensor: tensor.index))

    @cached_property
    def parameters(self) -> int:
        """Parameters of the model, shared ones counted once, padding not counted."""
        return sum(tensor.size for tensor in self.tensors)

    def blocks_of(self, first: int, stop: int) -> tuple[Block, ...]:
        """The blocks that layers ``first`` to ``stop - 1`` use."""
        return tuple(b for b in self.blocks if any(first <= layer < stop for layer in b.layers))

    def uses_of(self, layer: int) -> tuple[ParameterUse, ...]:
        return tuple(use for use in self.uses if use.layer == layer)
