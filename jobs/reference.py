"""The plain training loop that every distributed run is compared with, bit for bit.

One process, one autograd graph over the whole model, whole tensors, torch's AdamW (the function that the
class calls: to make an object of the class imports torch's compiler, which takes seconds). It shares with the
distributed runtime only definitions: the exact sum, the random streams, the sample order (inside
``batches``) and the optimizer's settings.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from jobs.sliced_reference import sliced_losses
from runtime import exact
from runtime.streams import seed_layer
from strategies.options import OptimizerSettings

Batches = Callable[[int, int], tuple[Any, Any]]
"""(step from 1, micro-batch from 0) -> (inputs, targets)."""

Loss = Callable[[Any, Any], tuple[Tensor, "Tensor | int"]]
"""(output of the last layer, targets) -> (sum of losses, count of samples or tokens)."""


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    """One finished step; ``step`` counts from 1.

    ``loss`` is the mean over the global count, ``grad_norm`` that of the mean gradient before
    clipping, ``fingerprint`` is of all parameters after the step, ``exponents`` are those the step
    was summed with.
    """

    step: int
    loss: float
    grad_norm: float
    fingerprint: int
    exponents: tuple[int, ...]


@dataclass(slots=True)
class _Parameter:
    """A parameter tensor with one leaf for each layer that uses it, so that each use has a gradient
    of its own, the sum of them all, and AdamW's two moments.
    """

    name: str
    leaves: list[nn.Parameter]
    accumulator_N: Tensor = field(init=False)
    moments: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        leaf = self.leaves[0]
        self.accumulator_N = torch.zeros(leaf.numel(), dtype=torch.float64, device=leaf.device)
        self.moments = (torch.zeros_like(leaf), torch.zeros_like(leaf))


class Reference:
    """Trains a copy of ``layers``; the caller's modules stay as they are.

    Tensors are numbered by first use over the layers, in the order of ``named_parameters``; parameters that
    need no gradient are left alone. Weight decay acts on tensors of two or more dimensions. ``orders[m]``:
    the layers that micro-batch m passes, in order, where that is not all of them; the gradient is that of
    the mean loss all the same. With ``slices`` above 1 (and all layers passed) each of them is computed by
    itself, where its gradients are too (``strategies.sequence``). Raises ValueError when a gradient is not
    finite.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        loss: Loss,
        batches: Batches,
        *,
        seed: int,
        micro_batches: int,
        settings: OptimizerSettings,
        autocast: bool = False,
        orders: Sequence[Sequence[int]] | None = None,
        slices: int = 1,
    ) -> None:
        assert orders is None or slices == 1, "slices pass all layers"
        self._orders = orders or [range(len(layers))] * micro_batches
        self._layers = [copy.deepcopy(layer) for layer in layers]  # one by one: this unties them
        self._further = [[copy.deepcopy(layer) for layer in layers] for _ in range(1, slices)]
        self._loss = loss
        self._batches = batches
        self._seed = seed
        self._micro_batches = micro_batches
        self._settings = settings
        self._autocast = autocast
        leaves: dict[int, tuple[str, list[nn.Parameter]]] = {}
        originals = list(enumerate(layers)) * slices
        every = [*self._layers, *(layer for each in self._further for layer in each)]
        for (number, original), own in zip(originals, every, strict=True):
            named = zip(original.named_parameters(), own.named_parameters(), strict=True)
            for (name, parameter), (_, leaf) in named:
                if leaf.requires_grad:
                    leaves.setdefault(id(parameter), (f"{number}.{name}", []))[1].append(leaf)
        self._parameters = [_Parameter(name, uses) for name, uses in leaves.values()]
        self._contributions = [micro_batches * len(p.leaves) for p in self._parameters]
        self._device = self._parameters[0].leaves[0].device
        self._workspace = exact.Workspace(self._device)
        self._exponents: list[int] | None = None
        self._step = 0

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters as they are now, in order of their numbers, by the name of first use."""
        return {p.name: p.leaves[0].detach() for p in self._parameters}

    def step(self) -> ReferenceStep:
        """Computes the next step, as often as its gradients need to be summed in range."""
        self._step += 1
        if self._exponents is None:
            self._exponents = self._next_exponents(self._sum(None)[0])
        while True:
            exponents = self._exponents
            maxima_T, losses, count = self._sum(exponents)
            self._exponents = self._next_exponents(maxima_T)
            if not exact.overflowed(maxima_T, torch.tensor(exponents), self._contributions):
                break
        squared = [exact.squared_norm(p.accumulator_N) for p in self._parameters]
        grad_norm = math.sqrt(exact.combine_squared_norms(squared, exponents)) / count
        self._update(exponents, grad_norm, count)
        fingerprint = sum(exact.fingerprint(p.leaves[0]) for p in self._parameters) % (1 << 64)
        return ReferenceStep(self._step, math.fsum(losses) / count, grad_norm, fingerprint, tuple(exponents))

    def _sum(self, exponents: list[int] | None) -> tuple[Tensor, list[float], int]:
        """Every micro-batch forward and backward: the maxima, the losses' sums and the count."""
        maxima_T = exact.new_maxima(len(self._parameters), self._device)
        losses, count = [], 0
        for parameter in self._parameters:
            parameter.accumulator_N.zero_()
        for micro_batch in range(self._micro_batches):
            found = self._forward(micro_batch)
            torch.autograd.backward([loss_sum for loss_sum, _ in found])
            losses.append(math.fsum(float(loss_sum.detach()) for loss_sum, _ in found))
            count += sum(int(samples) for _, samples in found)
            for index, parameter in enumerate(self._parameters):
                exponent = None if exponents is None else exponents[index]
                for leaf in parameter.leaves:
                    if leaf.grad is not None:
                        exact.accumulate(
                            parameter.accumulator_N, leaf.grad, exponent, maxima_T[index], self._workspace
                        )
                        leaf.grad = None
        bad = exact.first_non_finite(maxima_T)
        if bad is not None:
            raise ValueError(
                f"step {self._step}: the gradient of {self._parameters[bad].name} is not finite; "
                "lower the learning rate or check the data"
            )
        return maxima_T, losses, count

    def _forward(self, micro_batch: int) -> list[tuple[Tensor, Tensor | int]]:
        """The loss and count of every slice, or of the whole."""
        inputs, targets = _moved(self._batches(self._step, micro_batch), self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            if self._further:
                draw = partial(self._draw, micro_batch)
                return sliced_losses([self._layers, *self._further], self._loss, inputs, targets, draw)
            x = inputs
            for number in self._orders[micro_batch]:
                self._draw(micro_batch, number)
                x = self._layers[number](x)
            return [self._loss(x, targets)]

    def _draw(self, micro_batch: int, layer: int, part: tuple[int, ...] = ()) -> None:
        """Begins the random stream of a layer, or of a part of it."""
        seed_layer(self._seed, self._step, micro_batch, layer, self._device, part)

    def _next_exponents(self, maxima_T: Tensor) -> list[int]:
        exponents: list[int] = exact.next_exponents(maxima_T, self._contributions).tolist()
        return exponents

    def _update(self, exponents: list[int], grad_norm: float, count: int) -> None:
        settings = self._settings
        coefficient = 1.0
        if settings.clip_norm is not None:
            coefficient = exact.clip_coefficient(grad_norm, settings.clip_norm)
        gradients = [
            exact.mean_gradient(p.accumulator_N, exponent, coefficient / count).view_as(p.leaves[0])
            for p, exponent in zip(self._parameters, exponents, strict=True)
        ]
        both = list(zip(self._parameters, gradients, strict=True))
        self._adamw([pair for pair in both if pair[1].ndim >= 2], settings.weight_decay)
        self._adamw([pair for pair in both if pair[1].ndim < 2], 0.0)
        with torch.no_grad():
            for parameter in self._parameters:
                for other in parameter.leaves[1:]:
                    other.copy_(parameter.leaves[0])

    @torch.no_grad()
    def _adamw(self, updated: list[tuple[_Parameter, Tensor]], weight_decay: float) -> None:
        """This step's update of whole parameters by their gradients."""
        if not updated:
            return
        settings = self._settings
        steps_before = float(self._step - 1)  # the function itself adds the one
        adamw(
            [parameter.leaves[0] for parameter, _ in updated],
            [gradient for _, gradient in updated],
            [parameter.moments[0] for parameter, _ in updated],
            [parameter.moments[1] for parameter, _ in updated],
            [],
            [torch.tensor(steps_before, device=self._device) for _ in updated],
            fused=True,
            amsgrad=False,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            lr=settings.rate(self._step),
            weight_decay=weight_decay,
            eps=settings.eps,
            maximize=False,
        )


def _moved(value: Any, device: torch.device) -> Any:
    """``value`` (a tensor, or tuples, lists and dicts of them) with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
