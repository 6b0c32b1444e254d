"""Gradients through one piece of a graph, from given gradients of its outputs.

As ``torch.autograd.grad`` with ``grad_outputs``, which asks the same engine, but that the check of their
shapes there imports all of sympy: a third of a second of every worker's start, and memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward


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
    return _engine_run_backward(
        tuple(outputs),
        tuple(gradients),
        keep_graph,
        False,  # no graph of the gradients themselves
        tuple(wanted),
        True,  # some of them may be unused
        accumulate_grad=False,
    )


def leaf(tensor: Tensor, wanted: bool) -> Tensor:
    """``tensor`` as the beginning of a graph of its own, at which a gradient is ``wanted`` or not."""
    tensor = tensor.detach()
    return tensor.requires_grad_() if wanted and tensor.is_floating_point() else tensor


def owes_gradient(layer: int) -> bool:
    """Whether somebody waits for the gradients of the inputs of ``layer``: nobody for those of what the data
    gives, and an image's would be the dearest of all."""
    return layer > 0


def differentiate_ones(
    outputs: Sequence[Tensor], wanted: Sequence[Tensor], *, keep_graph: bool = False
) -> None:
    """The work of ``differentiate``, with gradients of one, for whatever of ``outputs`` and ``wanted``
    requires gradients; none where nothing does."""
    roots = [output for output in outputs if output.requires_grad]
    leaves = [tensor for tensor in wanted if tensor.requires_grad]
    if roots and leaves:
        differentiate(roots, [torch.ones_like(root) for root in roots], leaves, keep_graph=keep_graph)
