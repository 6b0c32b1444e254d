"""Gradients through one piece of a graph, from given gradients of its outputs.

As ``torch.autograd.grad`` with ``grad_outputs``, but that the check of their shapes there imports all of
sympy, which costs every worker a third of a second of its start, and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Root(torch.autograd.Function):
    """A scalar whose gradient for ``outputs`` is ``gradients``, the very tensors."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def differentiate(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    wanted: Sequence[Tensor],
    *,
    keep_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """The gradients of ``wanted``, None for what no output depends on. ``gradients``: of the ``outputs``, one
    for each and of its shape; all ``outputs`` and ``wanted`` require gradients, and there is at least one of
    each."""
    shapes = zip(outputs, gradients, strict=True)
    assert all(output.shape == gradient.shape for output, gradient in shapes), "else it would be summed"
    root: Tensor = _Root.apply(gradients, *outputs)  # type: ignore[no-untyped-call]
    return torch.autograd.grad([root], wanted, retain_graph=keep_graph, allow_unused=True)
