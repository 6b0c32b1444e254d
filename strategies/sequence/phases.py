"""What a layer says of itself so that several workers can compute it together.

A layer is a sequence of phases. A phase in the space of slices is computed for each slice of the sequence by
itself (norms, projections, an MLP); one in the space of heads for each attention head by itself, over the
whole sequence. Values that one space writes and another reads are exchanged, all to all, between those
who hold the slices and those who hold the heads (Jacobs et al., "DeepSpeed Ulysses", 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from strategies.sequence.division import slice_bounds

Tensors = tuple[Tensor, ...]


class Space(Enum):
    """What the parts of a phase are. Tensors in the space of slices are ``B T/slices ...``."""

    SLICES = "slices"
    HEADS = "heads"
    """A head has a tensor ``B T ...``; in the space of slices that is ``B T/slices heads ...``."""


class Act(Enum):
    """What a member of a team does next with a layer."""

    COMPUTE = "compute"
    SEND = "send"
    """Its parts of a value, or of a value's gradient, to those who read it. Nobody waits for that."""
    TAKE = "take"
    """What the others have sent, waiting for it if need be."""


Acts = tuple[tuple[Act, int, str], ...]
"""(what, the index of the phase, the value): of a computation the value, and of an exchange the phase, means
nothing."""


@dataclass(frozen=True)
class Phase:
    """``run`` turns the values ``reads`` of one part into its values ``writes``, one tensor each.

    ``parts``: how many heads there are; of slices there are as many as the recipe says. A parameter is used
    in one phase of slices, and in none of heads.
    """

    space: Space
    run: Callable[..., Tensors]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    parts: int = 0


@dataclass(frozen=True)
class Phases:
    """A layer in phases. ``inputs`` and ``outputs`` name what passes between layers, one tensor each, in the
    space of slices. Every name is written once."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[Phase, ...]

    @cached_property
    def home(self) -> dict[str, Space]:
        """In which space each value is written."""
        written = {name: phase.space for phase in self.steps for name in phase.writes}
        return {**dict.fromkeys(self.inputs, Space.SLICES), **written}

    @cached_property
    def exchanged(self) -> tuple[str, ...]:
        """The values that are read in the other space, in the order of their first reader."""
        return tuple(
            dict.fromkeys(
                name for phase in self.steps for name in phase.reads if self.home[name] is not phase.space
            )
        )

    def heads_of(self, name: str) -> int:
        """How many heads an exchanged value has."""
        return next(
            phase.parts
            for phase in self.steps
            if phase.space is Space.HEADS and name in (*phase.reads, *phase.writes)
        )

    @cached_property
    def forward(self) -> Acts:
        """A layer's forward: everything is sent as soon as it is there, and taken when it is needed, so that
        what is computed between the two hides the way."""
        acts = [(Act.SEND, 0, name) for name in self.inputs if name in self.exchanged]
        taken: set[str] = set()
        for number, phase in enumerate(self.steps):
            wanted = [name for name in phase.reads if self._is_away(name, phase) and name not in taken]
            taken.update(wanted)
            acts += [(Act.TAKE, number, name) for name in wanted]
            acts.append((Act.COMPUTE, number, ""))
            acts += [(Act.SEND, number, name) for name in phase.writes if name in self.exchanged]
        return tuple(acts)

    @cached_property
    def backward(self) -> Acts:
        """A layer's backward, likewise: what is exchanged are the values' gradients, the other way."""
        acts: list[tuple[Act, int, str]] = []
        first = {
            name: n
            for n, phase in reversed(list(enumerate(self.steps)))
            for name in phase.reads
            if self._is_away(name, phase)
        }
        for number, phase in reversed(list(enumerate(self.steps))):
            acts += [(Act.TAKE, number, name) for name in phase.writes if name in self.exchanged]
            acts.append((Act.COMPUTE, number, ""))
            acts += [(Act.SEND, number, name) for name, reader in first.items() if reader == number]
        acts += [(Act.TAKE, 0, name) for name in self.inputs if name in self.exchanged]
        return tuple(acts)

    def _is_away(self, name: str, phase: Phase) -> bool:
        return self.home[name] is not phase.space

    def away(self, name: str) -> Space:
        """The space in which an exchanged value is read."""
        return Space.HEADS if self.home[name] is Space.SLICES else Space.SLICES


def by_token(layer: Callable[[Tensor], Tensor]) -> Phases:
    """The phases of a layer that computes every token by itself."""
    return Phases(("x",), ("y",), (Phase(Space.SLICES, lambda x: (layer(x),), ("x",), ("y",)),))


def phases_of(layer: nn.Module) -> Phases | None:
    """What ``layer.phases()`` returns; None for a layer that has no such method, or one of a class that it
    derives from with another ``forward``."""
    for cls in type(layer).__mro__:
        if "phases" in vars(cls):
            described: Any = layer
            phases: Phases = described.phases()
            return phases
        if "forward" in vars(cls):
            return None
    return None


def check_phases(layers: Sequence[nn.Module]) -> None:
    """Raises ValueError for a model whose layers cannot all be computed in slices."""
    for index, layer in enumerate(layers):
        if phases_of(layer) is None:
            raise ValueError(
                f"layer {index} ({type(layer).__name__}) does not say how a sequence can be divided: set "
                "parallel.sequence = 1 and leave out parallel.sequence_slices, or give the layer a method "
                "phases (strategies.sequence.phases; see jobs.models.gpt)"
            )


def cut(tensors: Sequence[Tensor], slices: int) -> list[list[Tensor]]:
    """``tensors``, all ``B T ...``, by slice. Raises ValueError for others, and for sequences too short."""
    lengths = {tensor.shape[1] for tensor in tensors if tensor.ndim > 1}
    if len(lengths) != 1 or any(tensor.ndim < 2 for tensor in tensors):
        raise ValueError(
            "a sequence can be divided only where every tensor of the inputs and of the targets has the "
            "batch and the sequence as its first two dimensions: set parallel.sequence = 1 and leave out "
            "parallel.sequence_slices"
        )
    bounds = slice_bounds(lengths.pop(), slices)
    return [[tensor[:, start:stop].contiguous() for tensor in tensors] for start, stop in pairwise(bounds)]


# --- between the spaces ---------------------------------------------------------------------


def of_slice(tensor: Tensor, heads: range) -> Tensor:
    """What of a slice's tensor ``B t H ...`` goes to the holder of ``heads``."""
    return tensor[:, :, heads.start : heads.stop]


def into_head(slices: Sequence[Tensor], head: int) -> Tensor:
    """The ``head``-th of what ``of_slice`` gave, over all slices: ``B T ...``."""
    return torch.cat([tensor[:, :, head] for tensor in slices], dim=1)


def of_head(tensor: Tensor, start: int, stop: int) -> Tensor:
    """What of a head's tensor ``B T ...`` goes to the holder of tokens ``start`` to ``stop - 1``."""
    return tensor[:, start:stop]


def into_slice(heads: Sequence[Tensor]) -> Tensor:
    """A slice's tensor ``B t H ...`` from what ``of_head`` gave, over all heads."""
    return torch.stack(list(heads), dim=2)
