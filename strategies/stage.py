"""The layers that a worker holds: forward, backward, and the exact sums of their gradients.

Every layer runs as an autograd graph of its own. So the bits of a micro-batch's gradients cannot
depend on where the model is cut into stages, a layer's seconds can be measured, and a worker looks
up between two layers to see whether it has been interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from runtime.layout import Layout
from runtime.pulse import Pulse
from runtime.streams import seed_layer
from strategies.boundary import Spec, Value, flatten, unflatten
from strategies.differentiation import differentiate, leaf, owes_gradient
from strategies.model import LossFunction, Model
from strategies.options import WHOLE, Keeps, Precision
from strategies.residence import Residence, Window
from strategies.sums import GradientSums


@dataclass(slots=True)
class Activation:
    """What a layer keeps of a micro-batch from forward to backward; no outputs when recomputed.

    ``gradients`` are those of the outputs, where the weights' gradients are put off.
    """

    layer: int
    inputs: list[Tensor]
    spec: Spec
    outputs: list[Tensor] | None
    gradients: Gradients | None = None


Gradients = list[Tensor | None]
"""One for every tensor of a boundary value; None where nothing flows back."""

Collector = Callable[[int, Gradients, Sequence[int] | None], None]
"""Takes a layer's gradients, one for each of its parameters, and the scales of a step."""

Layers = tuple[int, int]
"""The first one, and the one after the last."""


@dataclass
class LayerTimes:
    """Seconds spent in each layer since the last ``take``, and how many micro-batches passed."""

    forward: dict[int, float] = field(default_factory=dict)
    backward: dict[int, float] = field(default_factory=dict)
    micro_batches: dict[int, int] = field(default_factory=dict)


class StageModel:
    """The layers of one or more stages, with their working parameters and gradient accumulators.

    ``working[block]`` is the flat float32 vector that the layers' parameters are views of;
    ``version[block]`` the number of optimizer steps in it, or None while it is being overwritten. By
    ``keeps`` both may be empty, or ``working`` be in host memory (offload); then ``window`` brings each
    layer's parameters into ``residence``. Where there are no ``accumulators``, ``collect`` gets gradients.
    """

    def __init__(
        self,
        model: Model,
        *,
        seed: int,
        precision: Precision,
        device: torch.device,
        exact: bool,
        compute_lock: AbstractContextManager[Any] | None = None,
        pulse: Pulse | None = None,
        keeps: Keeps = WHOLE,
    ) -> None:
        self.layout: Layout = model.layout
        self.loss: LossFunction = model.loss
        self.device = device
        self.held: tuple[Layers, ...] = ()
        self.working: dict[int, Tensor] = {}
        self.version: dict[int, int | None] = {}
        self.keeps = keeps
        # what is offloaded is summed where it is at home
        self.sums_device = torch.device("cpu") if keeps.offloads else device
        self._sums = GradientSums(self.layout, self.sums_device, exact=exact)
        self.accumulators = self._sums.accumulators
        self.maxima_T = self._sums.maxima_T
        self.residence = Residence(device) if keeps.streams else None
        self.window: Window | None = None
        self.collect: Collector | None = None
        self.times = LayerTimes()
        self.pulse = pulse or Pulse()
        self._seed = seed
        self._precision = precision
        self.recompute = frozenset(precision.recompute)
        """Layers whose activations are computed again in backward; a plan may choose others."""
        # threads of one process share torch's default generator, so seeding and drawing belong together
        self._lock = compute_lock or nullcontext()
        self._layers: list[nn.Module] = model.layers
        self._parameters: list[list[nn.Parameter]] = []
        self._untie()
        for layer in self._layers:
            layer.to(device)
            layer.train()

    def _untie(self) -> None:
        """Gives every layer parameters of its own, without memory until the layer is held."""
        for index, layer in enumerate(self._layers):
            fresh: dict[int, nn.Parameter] = {}
            for use in self.layout.uses_of(index):
                module_name, _, name = use.name.rpartition(".")
                module = layer.get_submodule(module_name)
                parameter = fresh.setdefault(use.tensor.index, nn.Parameter(torch.empty(0)))
                setattr(module, name, parameter)
            self._parameters.append(list(fresh.values()))

    def hold(self, *stages: Layers, keeps: Keeps | None = None) -> None:
        """Holds the layers of ``stages`` from now on, and lets go of the others; what there is of them in
        memory is up to ``keeps`` (None: as before).

        Blocks that stay keep their contents; new ones are uninitialised (version None), and their sums zeros.
        """
        if keeps is not None and keeps != self.keeps:
            self._keep(keeps)
        wanted = {block.index: block for stage in stages for block in self.layout.blocks_of(*stage)}
        for index in [index for index in self.working if index not in wanted]:
            del self.working[index], self.version[index]
        for index, block in sorted(wanted.items()):
            if self.keeps.parameters and index not in self.working:
                self.working[index] = self._at_home(block.size)
                self.version[index] = None
        self._sums.hold(wanted if self.keeps.sums else {})
        if self.residence is not None:
            self.residence.hold(wanted)
        if stages == self.held:
            return  # activations of a step that goes on refer to the parameters as they are
        self.held = stages
        for index in range(len(self._layers)):
            held = any(first <= index < stop for first, stop in stages)
            tensors = {use.tensor.index: use for use in self.layout.uses_of(index)}.values()
            for use, parameter in zip(tensors, self._parameters[index], strict=True):
                tensor = use.tensor
                if held:
                    flat = self._flat(use.block)[tensor.offset : tensor.stop]
                    parameter.data = flat.view(tensor.shape)
                    if self.residence is not None:
                        self.residence.vacate(use.block)
                else:
                    parameter.data = torch.empty(0, device=self.device)

    def prepare(self, working: Mapping[int, Tensor], accumulators: Mapping[int, Tensor]) -> None:
        """Takes memory, flat by block, for parameters and sums of blocks that are to be held next."""
        for block, memory in working.items():
            if block not in self.working:
                self.working[block], self.version[block] = memory, None
        for block, memory in accumulators.items():
            self.accumulators.setdefault(block, memory)

    def _keep(self, keeps: Keeps) -> None:
        assert keeps.offloads == self.keeps.offloads, "sums stay in the memory that they are in"
        self.keeps = keeps
        self.residence = Residence(self.device) if keeps.streams else None
        self.held = ()  # what the layers' parameters are views of is another memory
        if not keeps.parameters:
            self.working.clear()
            self.version.clear()

    def _flat(self, block: int) -> Tensor:
        """What the layers' parameters are views of: with memory, or no view can be made."""
        return self.working[block] if self.residence is None else self.residence.occupy(block)

    def _at_home(self, size: int) -> Tensor:
        """Memory for parameters that are kept; pinned where an accelerator fetches them from the host."""
        if self.residence is None:
            return torch.empty(size, device=self.device)
        return torch.empty(size, pin_memory=self.device.type == "cuda")

    def clear_gradients(self) -> None:
        self._sums.clear()

    def summed(self) -> dict[int, Tensor]:
        """The sums of gradients since ``clear_gradients``, by block: what ``accumulators`` hold."""
        return self._sums.summed()

    def split(self, value: Value) -> Value:
        """What the first layer takes of the data's inputs: here all of it, as it is."""
        return value

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
        """Runs the layers of the ``stage``-th of ``held`` on ``value``; ``check`` is called before every
        layer and may raise.

        Without ``train`` nothing is kept for backward and dropout is off.
        """
        activations: list[Activation] = []
        first, stop = self.held[stage]
        for index in range(first, stop):
            check()
            if self.window is not None:
                self.window.enter(index, index + 1 if index + 1 < stop else None)
            self.pulse.enter()
            began = time.perf_counter()
            inputs, spec = flatten(value)
            wanted = train and owes_gradient(index)
            inputs = [leaf(tensor.to(self.device), wanted) for tensor in inputs]
            keep_graph = train and index not in self.recompute
            outputs, output_spec = self._run(index, step, micro_batch, inputs, spec, train, keep_graph)
            if train:
                activations.append(Activation(index, inputs, spec, outputs if keep_graph else None))
            value = unflatten([tensor.detach() for tensor in outputs], output_spec)
            self._record(self.times.forward, index, began)
        return value, activations

    def _run(
        self,
        index: int,
        step: int,
        micro_batch: int,
        inputs: list[Tensor],
        spec: Spec,
        train: bool,
        keep_graph: bool,
    ) -> tuple[list[Tensor], Spec]:
        layer = self._layers[index]
        if layer.training is not train:
            layer.train(train)
        with self._lock, torch.set_grad_enabled(keep_graph), self._autocast():
            if train:
                seed_layer(self._seed, step, micro_batch, index, self.device)
            return flatten(layer(unflatten(inputs, spec)))

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self._precision.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def loss_of(self, output: Value, targets: Value, *, train: bool) -> tuple[float, int, Gradients]:
        """The micro-batch's summed loss, its count, and the gradient of the last layer's output."""
        outputs, spec = flatten(output)
        outputs = [leaf(tensor, train) for tensor in outputs]
        target_tensors, target_spec = flatten(targets)
        targets = unflatten([tensor.to(self.device) for tensor in target_tensors], target_spec)
        with torch.set_grad_enabled(train), self._autocast():
            loss, count = self.loss(unflatten(outputs, spec), targets)
        gradients = self._differentiate([loss], [torch.ones_like(loss)], outputs, []) if train else []
        return float(loss.detach()), int(count), gradients

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
        """Runs backward through ``activations``, adds the parameters' gradients to the exact sums.

        ``exponents`` holds one scale per tensor of the model; None (the probing pass) only records
        the largest gradients. ``gradients`` come in as those of the output and become those of the stage's
        input, layer by layer, as ``activations`` are used up: where ``check`` raises, a further call with
        both goes on with the layer that is next. Where ``deferred`` is given, the parameters' gradients are
        left to ``weight_gradients``: it takes in what that needs.
        """
        while activations:
            check()
            activation = activations[-1]
            index, outputs = activation.layer, activation.outputs
            self._enter(index, activations)
            self.pulse.enter()
            began = time.perf_counter()
            if outputs is None:
                outputs, _ = self._run(
                    index, step, micro_batch, activation.inputs, activation.spec, True, True
                )
            parameters = self._parameters[index] if deferred is None else []
            keep = deferred is not None
            flowing = self._differentiate(outputs, gradients, activation.inputs, parameters, keep_graph=keep)
            if deferred is None:
                self._sum(index, flowing[len(activation.inputs) :], exponents)
            elif any(parameter.requires_grad for parameter in self._parameters[index]):
                activation.outputs, activation.gradients = outputs, list(gradients)
                deferred.append(activation)
            gradients[:] = flowing[: len(activation.inputs)]
            activations.pop()
            self._record(self.times.backward, index, began)

    def weight_gradients(
        self, deferred: list[Activation], exponents: Sequence[int] | None, *, check: Callable[[], None]
    ) -> None:
        """The part of ``backward`` that it put off (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR'24):
        the same bits, since autograd sums what flows into a node in one order, whoever asks for it.

        What flows inside of a layer, from its output to its first parameters, is computed a second time: a
        layer of one matrix pays nothing for the split, a deep one up to the input gradient's time.

        Uses up ``deferred`` layer by layer, and goes on with what is left of it as ``backward`` does.
        """
        while deferred:
            check()
            activation = deferred[-1]
            index = activation.layer
            self._enter(index, deferred)
            self.pulse.enter()
            began = time.perf_counter()
            assert activation.outputs is not None and activation.gradients is not None
            parameters = self._parameters[index]
            flowing = self._differentiate(activation.outputs, activation.gradients, [], parameters)
            self._sum(index, flowing, exponents)
            deferred.pop()
            self._record(self.times.backward, index, began)

    def _enter(self, index: int, activations: list[Activation]) -> None:
        if self.window is not None:
            self.window.enter(index, activations[-2].layer if len(activations) > 1 else None)

    def _differentiate(
        self,
        outputs: list[Tensor],
        gradients: Gradients,
        inputs: list[Tensor],
        parameters: list[nn.Parameter],
        *,
        keep_graph: bool = False,
    ) -> Gradients:
        """Gradients of ``inputs`` and ``parameters``, None where there is none."""
        roots = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if output.requires_grad and gradient is not None
        ]
        wanted = [tensor for tensor in [*inputs, *parameters] if tensor.requires_grad]
        if not roots or not wanted:
            return [None] * (len(inputs) + len(parameters))
        found = iter(
            differentiate(
                [output for output, _ in roots],
                [gradient for _, gradient in roots],
                wanted,
                keep_graph=keep_graph,
            )
        )
        return [next(found) if tensor.requires_grad else None for tensor in [*inputs, *parameters]]

    def _sum(self, index: int, gradients: Gradients, exponents: Sequence[int] | None) -> None:
        if self.collect is not None:
            self.collect(index, gradients, exponents)
        else:
            self._sums.add(index, gradients, exponents)

    def _record(self, seconds: dict[int, float], index: int, began: float) -> None:
        self.pulse.leave()
        if self.window is not None:
            self.window.leave(index)
        seconds[index] = seconds.get(index, 0.0) + time.perf_counter() - began
        if seconds is self.times.forward:
            self.times.micro_batches[index] = self.times.micro_batches.get(index, 0) + 1

    def take_times(self) -> LayerTimes:
        """What was measured since the last call."""
        times, self.times = self.times, LayerTimes()
        return times
