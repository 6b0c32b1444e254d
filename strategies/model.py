"""A user's model as a sequence of layers, and the layout of its parameters.

Any ``nn.Module`` can be a layer. A parameter object that appears in more than one layer is tied:
it gets a block of its own, every layer gets a copy, and the gradients of all copies are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.layout import Block, Layout, ParameterUse, TensorSpec, aligned

LossFunction = Callable[[Any, Any], tuple[Tensor, Any]]
"""(output of the last layer, targets) -> (sum of the losses, number of samples or tokens in it)."""

ModelBuilder = Callable[[], tuple[list[nn.Module], LossFunction]]


@dataclass(frozen=True)
class Model:
    """The layers as the user's function built them, their loss and the parameters' layout."""

    layers: list[nn.Module]
    loss: LossFunction
    layout: Layout


def build_model(build: ModelBuilder, seed: int) -> Model:
    """Builds the model from ``seed``: the same initial parameters wherever it is called.

    Raises ValueError for a model that cannot be trained layer by layer.
    """
    torch.manual_seed(seed)
    built = build()
    if not (isinstance(built, tuple) and len(built) == 2):
        raise ValueError("the model's build function must return (list of layers, loss function)")
    layers, loss = built
    if not layers or not all(isinstance(layer, nn.Module) for layer in layers):
        raise ValueError("the model's build function must return a non-empty list of nn.Module layers")
    if not callable(loss):
        raise ValueError("the model's build function must return a callable loss as its second value")
    for index, layer in enumerate(layers):
        _refuse_unsupported(index, layer)
    return Model(list(layers), loss, describe(layers))


def _refuse_unsupported(index: int, layer: nn.Module) -> None:
    for name, module in layer.named_modules():
        where = f"layer {index} ({type(layer).__name__}{'.' + name if name else ''})"
        if getattr(module, "track_running_stats", False):
            raise ValueError(
                f"{where} is a {type(module).__name__} that updates running statistics in forward, which "
                "would depend on who computes which micro-batch; use a layer norm or group norm, or "
                "track_running_stats=False"
            )
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(
                f"parameter {name} of layer {index} is {parameter.dtype}; parameters must be float32 "
                '(set precision.autocast = "bf16" to compute in bfloat16)'
            )


def describe(layers: Sequence[nn.Module]) -> Layout:
    """The layout of all parameters that are trained.

    Tensors are counted in the order of their first use, layer by layer, in the order of
    ``named_parameters``. Matrices and larger decay; vectors (norms, biases) do not.
    """
    users: dict[int, list[int]] = {}
    named: dict[int, list[list[str]]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                continue
            key = id(parameter)
            parameters[key] = parameter
            uses = users.setdefault(key, [])
            names = named.setdefault(key, [])
            if not uses or uses[-1] != index:
                uses.append(index)
                names.append([])
            names[-1].append(name)

    groups: dict[tuple[int, ...] | tuple[int, int], list[int]] = {}
    for key, uses in users.items():
        # a tied parameter is a block by itself: its holders differ from its layers' other blocks
        groups.setdefault((uses[0],) if len(uses) == 1 else (-1, key), []).append(key)

    order = {key: position for position, key in enumerate(parameters)}
    blocks: list[Block] = []
    uses_of: list[ParameterUse] = []
    for keys in groups.values():
        offset = 0
        specs: list[TensorSpec] = []
        for key in keys:
            parameter = parameters[key]
            spec = TensorSpec(
                index=order[key],
                name=f"{users[key][0]}.{named[key][0][0]}",
                shape=tuple(parameter.shape),
                offset=offset,
                decays=parameter.ndim >= 2,
            )
            specs.append(spec)
            offset += aligned(parameter.numel())
            for layer_index, spellings in zip(users[key], named[key], strict=True):
                uses_of += [ParameterUse(layer_index, each, len(blocks), spec) for each in spellings]
        layers_using = tuple(users[keys[0]])
        name = specs[0].name if len(layers_using) > 1 else f"layer {layers_using[0]}"
        blocks.append(Block(len(blocks), name, layers_using, tuple(specs), offset))
    if not blocks:
        raise ValueError("the model has no trainable parameters")
    return Layout(len(layers), tuple(blocks), tuple(sorted(uses_of, key=lambda u: (u.layer, u.tensor.index))))


def flat_parameters(model: Model, block: Block) -> Tensor:
    """The block's parameters as ``model`` holds them: float32, ``block.size`` elements, padding zero."""
    flat = torch.zeros(block.size)
    for use in model.layout.uses:
        if use.block == block.index and use.layer == block.layers[0]:
            parameter = model.layers[use.layer].get_parameter(use.name)
            flat[use.tensor.offset : use.tensor.stop] = parameter.detach().reshape(-1)
    return flat
