"""A model's layers as the one module that a foreign engine wants, taken back unharmed when the engine
goes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from runtime.layout import Layout
from runtime.streams import seed_layer
from strategies.model import Model

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

_LEFT_BEHIND = (
    "_external_params",
    "_original_parameters",
    "all_parameters",
    "applied_pre_backward_ref_cnt",
    "ds_external_parameters",
    "ds_grads_remaining",
    "ds_id",
    "ds_inflight_param_registry",
    "ds_recompute_parameters",
    "post_bwd_fn",
    "pre_bwd_fn",
)
"""What ZeRO-3 keeps on modules. After an interrupted step it speaks of collectives that will never end."""


class StepModule(nn.Module):
    """All layers and the loss. Random streams are those of ``runtime.streams``, by layer.

    An engine converts parameters, swaps a module's dictionaries and leaves hooks behind. ``reclaim`` undoes
    all of it: the modules stay, and get fresh parameters of the layout.
    """

    def __init__(self, model: Model, seed: int, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(model.layers)
        self.layout: Layout = model.layout
        self._loss = model.loss
        self._seed, self._device = seed, device
        self._of_user = {
            module: {name: OrderedDict(getattr(module, name)) for name in _HOOKS}
            for module in self.layers.modules()
        }
        trained = {(use.layer, use.name) for use in self.layout.uses}
        self._frozen = [
            (layer, name, parameter.detach().clone())
            for layer, module in enumerate(model.layers)
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if (layer, name) not in trained
        ]
        self.tensors: dict[int, nn.Parameter] = {}
        """The parameters by ``TensorSpec.index``."""

    def forward(self, inputs: Any, targets: Any, step: int, micro_batch: int) -> tuple[Tensor, Any]:
        """(sum of the losses, number of samples or tokens) of a micro-batch."""
        x = self._fitting(inputs)
        for number, layer in enumerate(self.layers):
            seed_layer(self._seed, step, micro_batch, number, self._device)
            x = layer(x)
        total, count = self._loss(x, moved(targets, self._device))
        return total, count

    def _fitting(self, value: Any) -> Any:
        """``value`` on the device, floating-point tensors in the precision of the parameters."""
        dtype = next(iter(self.tensors.values())).dtype
        return moved(value, self._device, dtype)

    def reclaim(self, working: dict[int, Tensor]) -> None:
        """Gives every layer fresh float32 parameters with the values of ``working`` (flat, by block)."""
        for module, hooks in self._of_user.items():
            for name, kept in hooks.items():
                setattr(module, name, OrderedDict(kept))
        for module in self.modules():
            for name in _LEFT_BEHIND:
                module.__dict__.pop(name, None)
            # ZeRO-3 puts a dictionary of its own there, which gathers what is looked up
            module._parameters = dict(module._parameters)
        for name in _HOOKS:
            getattr(self, name).clear()
        self.tensors = {}
        for use in self.layout.uses:
            tensor = use.tensor
            if tensor.index not in self.tensors:
                values = working[use.block][tensor.offset : tensor.stop].view(tensor.shape)
                self.tensors[tensor.index] = nn.Parameter(values.detach().clone().to(self._device))
            self._put(use.layer, use.name, self.tensors[tensor.index])
        for layer, name, frozen in self._frozen:
            self._put(layer, name, nn.Parameter(frozen.clone().to(self._device), requires_grad=False))

    def _put(self, layer: int, name: str, parameter: nn.Parameter) -> None:
        owner, _, own = name.rpartition(".")
        self.layers[layer].get_submodule(owner)._parameters[own] = parameter


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """``value`` (a tensor, or tuples, lists and dicts of them) on ``device``; floating-point ones as
    ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, (tuple, list)):
        return type(value)(moved(item, device, dtype) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    return value
