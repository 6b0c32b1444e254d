"""The layers that a worker holds, computed slice by slice and head by head, alone or in a team.

Every part of every phase runs as an autograd graph of its own, with a random stream of its own, and its
gradients are a contribution of their own to the exact sums: the bits do not depend on who computes it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from runtime.streams import seed_layer
from strategies.boundary import Value, flatten, unflatten
from strategies.differentiation import leaf, owes_gradient
from strategies.model import Model
from strategies.sequence.exchange import Exchange
from strategies.sequence.phases import Act, Phase, Phases, Space, Tensors, check_phases, cut, phases_of
from strategies.stage import Activation, Gradients, StageModel

Sliced = dict[int, Tensors]
"""What passes between layers: by slice, the tensors that the layers name."""

Losses = list[tuple[float, int]]
"""Summed loss and count of each slice."""


@dataclass(slots=True)
class PartActivation(Activation):
    """What one part of one phase keeps. ``part`` is a slice or a head."""

    phase: int = 0
    part: int = 0


@dataclass(frozen=True, slots=True)
class _Place:
    """A layer's pass of one micro-batch."""

    layer: int
    step: int
    micro_batch: int
    backward: bool = False


class SequenceStage(StageModel):
    """A ``StageModel`` whose values are ``Sliced``: those of this worker's slices in the team that it is in
    (``together``), of all slices while it is alone. Gradients of such a value come slice by slice."""

    def __init__(self, model: Model, *, slices: int, **settings: Any) -> None:
        check_phases(model.layers)
        described = [phases_of(layer) for layer in model.layers]
        self._phases: list[Phases] = [phases for phases in described if phases is not None]
        self.slices = slices
        self._alone = self._exchange = Exchange(slices)
        super().__init__(model, **settings)

    @contextmanager
    def together(self, exchange: Exchange) -> Iterator[None]:
        """Computes as the member that ``exchange`` says, for a while."""
        self._exchange = exchange
        try:
            yield
        finally:
            self._exchange = self._alone

    def split(self, value: Value) -> Sliced:
        """All slices of ``value``, whose tensors are all ``B T ...``. Raises ValueError for others."""
        tensors, _ = flatten(value)
        return {s: tuple(part) for s, part in enumerate(cut(tensors, self.slices))}

    def split_targets(self, targets: Value) -> list[Value]:
        """As ``split``, in the form that the loss knows."""
        tensors, spec = flatten(targets)
        return [unflatten(part, spec) for part in cut(tensors, self.slices)]

    # --- forward ----------------------------------------------------------------------------

    def forward(
        self,
        step: int,
        micro_batch: int,
        value: Value,
        *,
        train: bool,
        check: Callable[[], None],
        stage: int = 0,
    ) -> tuple[Value, list[Activation]]:
        """See ``StageModel``; the team's other members do the same at the same time."""
        activations: list[Activation] = []
        for index in range(*self.held[stage]):
            check()
            # counted before an exchange can be interrupted
            self.times.micro_batches[index] = self.times.micro_batches.get(index, 0) + 1
            value = self._forward_layer(_Place(index, step, micro_batch), value, train, activations)
        return value, activations

    def _forward_layer(
        self, place: _Place, value: Sliced, train: bool, activations: list[Activation]
    ) -> Sliced:
        phases = self._phases[place.layer]
        keep_graph = train and place.layer not in self.recompute
        held: dict[tuple[str, Space], dict[int, Tensor]] = {}
        for position, name in enumerate(phases.inputs):
            held[name, Space.SLICES] = {each: tensors[position] for each, tensors in value.items()}
        for act, number, name in phases.forward:
            if act is Act.SEND:
                self._send(place, name, held[name, phases.home[name]])
            elif act is Act.TAKE:
                held[name, phases.away(name)] = self._take(place, name, held[name, phases.home[name]])
            else:
                self._forward_phase(place, number, held, train, keep_graph, activations)
        return {
            each: tuple(held[name, Space.SLICES][each] for name in phases.outputs)
            for each in self._exchange.own
        }

    def _forward_phase(
        self,
        place: _Place,
        number: int,
        held: dict[tuple[str, Space], dict[int, Tensor]],
        train: bool,
        keep_graph: bool,
        activations: list[Activation],
    ) -> None:
        phases = self._phases[place.layer]
        phase = phases.steps[number]
        given = () if owes_gradient(place.layer) else phases.inputs
        held.update({(name, phase.space): {} for name in phase.writes})
        for part in self._parts(phase):
            began = self._begin()
            inputs = [
                leaf(held[name, phase.space][part].to(self.device), train and name not in given)
                for name in phase.reads
            ]
            outputs = self._run_part(place, number, part, inputs, train, keep_graph)
            if train:
                kept = outputs if keep_graph else None
                activations.append(
                    PartActivation(place.layer, inputs, ("plain", None), kept, None, number, part)
                )
            for name, output in zip(phase.writes, outputs, strict=True):
                held[name, phase.space][part] = output.detach()
            self._end(self.times.forward, place.layer, began, phase)

    def _run_part(
        self, place: _Place, number: int, part: int, inputs: list[Tensor], train: bool, keep_graph: bool
    ) -> list[Tensor]:
        layer = self._layers[place.layer]
        if layer.training is not train:
            layer.train(train)
        phase = self._phases[place.layer].steps[number]
        with self._lock, torch.set_grad_enabled(keep_graph), self._autocast():
            if train:
                seed_layer(
                    self._seed, place.step, place.micro_batch, place.layer, self.device, (number, part)
                )
            return list(phase.run(*inputs))

    def _parts(self, phase: Phase) -> range:
        """What this worker computes of a phase."""
        exchange = self._exchange
        if phase.space is Space.SLICES:
            return exchange.own
        return exchange.heads_of(exchange.place, phase.parts)

    # --- loss -------------------------------------------------------------------------------

    def loss_of(self, output: Value, targets: Value, *, train: bool) -> tuple[float, int, Gradients]:
        """See ``StageModel``; ``output`` has all slices. The slices' losses are added and rounded once."""
        losses, gradients = self.losses_of(output, self.split_targets(targets), train=train)
        return math.fsum(loss for loss, _ in losses), sum(count for _, count in losses), gradients

    def losses_of(self, output: Sliced, targets: Sequence[Value], *, train: bool) -> tuple[Losses, Gradients]:
        """The losses of the slices in ``output``, whose ``targets`` these are, and the gradients of it."""
        losses: Losses = []
        gradients: Gradients = []
        for tensors, wanted in zip(output.values(), targets, strict=True):
            value = tensors[0] if len(tensors) == 1 else tensors
            loss, count, flowing = super().loss_of(value, wanted, train=train)
            losses.append((loss, count))
            gradients += flowing
        return losses, gradients

    # --- backward ---------------------------------------------------------------------------

    def backward(
        self,
        step: int,
        micro_batch: int,
        activations: list[Activation],
        gradients: Gradients,
        exponents: Sequence[int] | None,
        *,
        check: Callable[[], None],
        deferred: list[Activation] | None = None,
    ) -> None:
        """See ``StageModel``. It goes on after an interrupt only where the worker is alone: in a team some
        parts of a layer may be in the sums and others not."""
        while activations:
            check()
            index = activations[-1].layer
            first = len(activations) - sum(each.layer == index for each in activations)
            place = _Place(index, step, micro_batch, backward=True)
            found = self._backward_layer(place, activations[first:], gradients, exponents, deferred)
            gradients[:] = found
            del activations[first:]

    def _backward_layer(
        self,
        place: _Place,
        activations: Collection[Activation],
        gradients: Gradients,
        exponents: Sequence[int] | None,
        deferred: list[Activation] | None,
    ) -> Gradients:
        phases = self._phases[place.layer]
        own = self._exchange.own
        flowing: dict[tuple[str, Space], dict[int, Tensor | None]] = {}
        for position, name in enumerate(phases.outputs):
            flowing[name, Space.SLICES] = dict(
                zip(own, gradients[position :: len(phases.outputs)], strict=True)
            )
        for act, number, name in phases.backward:
            if act is Act.SEND:
                self._send(place, name, _whole(flowing.get((name, phases.away(name)), {})))
            elif act is Act.TAKE:
                self._collect(place, name, flowing)
            else:
                for activation in activations:
                    if isinstance(activation, PartActivation) and activation.phase == number:
                        phase = phases.steps[number]
                        self._backward_part(place, phase, activation, flowing, exponents, deferred)
        return [flowing.get((name, Space.SLICES), {}).get(each) for each in own for name in phases.inputs]

    def _backward_part(
        self,
        place: _Place,
        phase: Phase,
        activation: PartActivation,
        flowing: dict[tuple[str, Space], dict[int, Tensor | None]],
        exponents: Sequence[int] | None,
        deferred: list[Activation] | None,
    ) -> None:
        began = self._begin()
        part, inputs, outputs = activation.part, activation.inputs, activation.outputs
        if outputs is None:
            forward = replace(place, backward=False)
            outputs = self._run_part(forward, activation.phase, part, inputs, True, True)
        coming = [flowing.get((name, phase.space), {}).get(part) for name in phase.writes]
        of_heads = phase.space is Space.HEADS
        parameters = self._parameters[place.layer] if deferred is None or of_heads else []
        found = self._differentiate(outputs, coming, inputs, parameters, keep_graph=deferred is not None)
        if of_heads:
            if any(gradient is not None for gradient in found[len(inputs) :]):
                raise ValueError(
                    f"layer {place.layer} uses a parameter in a phase of heads, but the sums count one "
                    "gradient a slice: use each parameter in one phase of slices"
                )
        elif deferred is None:
            self._sum(place.layer, found[len(inputs) :], exponents)
        elif any(parameter.requires_grad for parameter in self._parameters[place.layer]):
            deferred.append(replace(activation, outputs=outputs, gradients=coming))
        home = self._phases[place.layer].home
        for name, tensor, gradient in zip(phase.reads, inputs, found, strict=False):
            if gradient is None and home[name] is not phase.space:
                gradient = torch.zeros_like(tensor)  # the others wait for it
            totals = flowing.setdefault((name, phase.space), {})
            totals[part] = _added(totals.get(part), gradient)
        self._end(self.times.backward, place.layer, began, phase)

    def _collect(
        self, place: _Place, name: str, flowing: dict[tuple[str, Space], dict[int, Tensor | None]]
    ) -> None:
        """Adds what flows back from the readers of ``name`` in the other space."""
        phases = self._phases[place.layer]
        totals = flowing.setdefault((name, phases.home[name]), {})
        came = self._take(place, name, _whole(flowing.get((name, phases.away(name)), {})))
        for part, gradient in came.items():
            totals[part] = _added(totals.get(part), gradient.to(self.device))

    # --- exchanges --------------------------------------------------------------------------

    def _send(self, place: _Place, name: str, parts: dict[int, Tensor]) -> None:
        phases = self._phases[place.layer]
        to_heads = (phases.home[name] is Space.SLICES) is not place.backward
        send = self._exchange.send_slices if to_heads else self._exchange.send_heads
        send(self._index(place, name), parts, phases.heads_of(name))

    def _take(self, place: _Place, name: str, parts: dict[int, Tensor]) -> dict[int, Tensor]:
        phases = self._phases[place.layer]
        to_heads = (phases.home[name] is Space.SLICES) is not place.backward
        take = self._exchange.take_heads if to_heads else self._exchange.take_slices
        return take(self._index(place, name), parts, phases.heads_of(name))

    def _index(self, place: _Place, name: str) -> tuple[int, ...]:
        number = self._phases[place.layer].exchanged.index(name)
        return place.micro_batch, place.layer, number, int(place.backward)

    # --- account ----------------------------------------------------------------------------

    def _begin(self) -> float:
        self.pulse.enter()
        return time.perf_counter()

    def _end(self, seconds: dict[int, float], layer: int, began: float, phase: Phase) -> None:
        """Takes down how long this worker would need for all parts of the phase: teams of any size, and
        members with more heads than others, are then compared by how fast they are."""
        whole = self.slices if phase.space is Space.SLICES else phase.parts
        self._note(seconds, layer, began, whole / len(self._parts(phase)))

    def _record(self, seconds: dict[int, float], index: int, began: float) -> None:
        """Of weight gradients that were put off, which are all of slices."""
        self._note(seconds, index, began, self.slices / len(self._exchange.own))

    def _note(self, seconds: dict[int, float], layer: int, began: float, times: float) -> None:
        self.pulse.leave()
        seconds[layer] = seconds.get(layer, 0.0) + (time.perf_counter() - began) * times


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if total is None or gradient is None:
        return gradient if total is None else total
    return total + gradient


def _whole(gradients: dict[int, Tensor | None]) -> dict[int, Tensor]:
    found = {part: gradient for part, gradient in gradients.items() if gradient is not None}
    assert len(found) == len(gradients), "what is exchanged has a gradient in every part"
    return found
