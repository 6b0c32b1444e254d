"""Where a DeepSpeed engine keeps the float32 state that a rank holds, as views by tensor.

DeepSpeed has no one interface for this over its stages. What is read here are the flat partitions that its
own checkpoints are made of; views alias the live state, so they serve for taking a copy and for restoring
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.snapshots import ROWS

MOMENTS = ROWS - 1


@dataclass(frozen=True, slots=True)
class Flat:
    """One float32 tensor that the inner optimizer updates. ``group`` is that of its parameter group."""

    tensor: Tensor
    group: int


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements ``start`` to ``stop - 1`` of tensor ``index``, from element ``at`` of ``flat`` on."""

    index: int
    start: int
    stop: int
    flat: Tensor
    at: int

    @property
    def place(self) -> slice:
        return slice(self.at, self.at + self.stop - self.start)


def inner_optimizer(engine: Any) -> Any:
    """The optimizer that ZeRO wraps, or the engine's own without ZeRO."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def flats(engine: Any, stage: int) -> list[Flat]:
    """Every tensor that the inner optimizer updates on this rank."""
    optimizer = engine.optimizer
    if stage == 0:
        groups = enumerate(optimizer.param_groups)
        return [Flat(parameter, number) for number, group in groups for parameter in group["params"]]
    if stage < 3:
        return [Flat(flat, number) for number, flat in enumerate(optimizer.single_partition_of_fp32_groups)]
    whole = optimizer.fp32_partitioned_groups_flat
    return [Flat(flat, optimizer.sub_group_to_group_id[number]) for number, flat in enumerate(whole)]


def fragments(engine: Any, stage: int, tensors: dict[int, Any], rank: int) -> Iterator[Fragment]:
    """What of every tensor this rank holds; ``tensors`` are the module's parameters by index."""
    optimizer = engine.optimizer
    for index, parameter in tensors.items():
        if stage == 0:
            yield Fragment(index, 0, parameter.numel(), parameter, 0)
        elif stage < 3:
            mapping = parameter._hp_mapping
            if mapping is not None:
                flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Fragment(index, there.start, there.start + there.numel, flat, here.start)
        else:
            group, at, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, stop = rank * part, min((rank + 1) * part, parameter.ds_numel)
            if start < stop:
                yield Fragment(index, start, stop, optimizer.fp32_partitioned_groups_flat[group], at)


def make_moments(engine: Any, stage: int) -> tuple[str, ...]:
    """Has the inner optimizer make the state that it otherwise makes in its first step, and returns the names
    of what there is for each element (exp_avg and exp_avg_sq of Adam).

    That step has zero gradients and a learning rate of zero; what it counts and changes must be restored
    afterwards. Raises ValueError for an optimizer whose state this cannot hold.
    """
    inner, found = inner_optimizer(engine), flats(engine, stage)
    before = [(group["params"], group["lr"]) for group in inner.param_groups]
    for number, group in enumerate(inner.param_groups):
        group["params"], group["lr"] = [flat.tensor for flat in found if flat.group == number], 0.0
    gradients = [flat.tensor.grad for flat in found]
    for flat in found:
        flat.tensor.grad = torch.zeros_like(flat.tensor)
    inner.step()
    for flat, gradient in zip(found, gradients, strict=True):
        flat.tensor.grad = gradient
    for group, (parameters, rate) in zip(inner.param_groups, before, strict=True):
        group["params"], group["lr"] = parameters, rate
    names = tuple(
        sorted(
            name
            for name, value in inner.state[found[0].tensor].items()
            if isinstance(value, Tensor) and value.shape == found[0].tensor.shape and value.ndim
        )
    )
    if len(names) > MOMENTS or any(
        inner.state[flat.tensor].keys() != inner.state[found[0].tensor].keys() for flat in found
    ):
        raise ValueError(
            f"the optimizer {type(inner).__name__} keeps {', '.join(names)} for every element, but no more "
            f"than "
            f"{MOMENTS} such values can be kept: choose Adam, AdamW, SGD, Adagrad or Lion in the DeepSpeed "
            "configuration"
        )
    return names
