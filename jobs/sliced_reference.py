"""A micro-batch of the plain training loop whose sequence is computed in slices: one graph, one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from strategies.boundary import flatten, unflatten
from strategies.sequence.phases import Phases, Space, Tensors, cut, phases_of

Draw = Callable[[int, tuple[int, ...]], None]
"""Begins the random stream of (layer, part of it)."""


def sliced_losses(
    models: Sequence[Sequence[nn.Module]],
    loss: Callable[[Any, Any], tuple[Tensor, Any]],
    inputs: Any,
    targets: Any,
    draw: Draw,
) -> list[tuple[Tensor, Any]]:
    """Each slice's loss and count. ``models[s][l]`` computes slice s at layer l, so that every slice has
    gradients of its own."""
    slices = len(models)
    tensors, _ = flatten(inputs)
    values: list[Tensors] = [tuple(part) for part in cut(tensors, slices)]
    for number, copies in enumerate(zip(*models, strict=True)):
        described = [phases for phases in map(phases_of, copies) if phases is not None]
        values = _through(described, values, partial(draw, number))
    wanted, spec = flatten(targets)
    return [
        loss(value[0] if len(value) == 1 else value, unflatten(part, spec))
        for value, part in zip(values, cut(wanted, slices), strict=True)
    ]


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        return tensor.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def _read(tensor: Tensor) -> Tensor:
    """The same values, and the same gradient, each without gaps in memory, for kernels may round by strides.
    What one phase says of a gradient is added up before it is added to what others say."""
    if not tensor.requires_grad:
        return tensor
    read: Tensor = _Read.apply(tensor)  # type: ignore[no-untyped-call]
    return read


def _through(
    copies: Sequence[Phases], values: Sequence[Tensors], draw: Callable[[tuple[int, ...]], None]
) -> list[Tensors]:
    phases = copies[0]
    lengths = [tensors[0].shape[1] for tensors in values]
    known: dict[tuple[str, Space], Sequence[Tensor]] = {}
    for place, name in enumerate(phases.inputs):
        known[name, Space.SLICES] = [tensors[place] for tensors in values]
    for number, phase in enumerate(phases.steps):
        for name in phase.reads:
            if (name, phase.space) not in known and phase.space is Space.HEADS:
                whole = torch.cat(list(known[name, Space.SLICES]), dim=1)
                known[name, phase.space] = whole.unbind(2)
            elif (name, phase.space) not in known:
                whole = torch.stack(list(known[name, Space.HEADS]), dim=2)
                known[name, phase.space] = torch.split(whole, lengths, dim=1)
        made = []
        for part in range(len(copies) if phase.space is Space.SLICES else phase.parts):
            draw((number, part))
            own = copies[part] if phase.space is Space.SLICES else phases
            made.append(
                own.steps[number].run(*(_read(known[name, phase.space][part]) for name in phase.reads))
            )
        for name, tensors in zip(phase.writes, zip(*made, strict=True), strict=True):
            known[name, phase.space] = tensors
    return list(zip(*(known[name, Space.SLICES] for name in phases.outputs), strict=True))
