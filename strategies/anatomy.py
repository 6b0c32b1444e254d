"""What a layer keeps from forward to backward, and how long the two parts of its backward take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from strategies.differentiation import differentiate_ones

RUNS = 2
"""The faster one counts."""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """``kept_bytes``: saved tensors and outputs of one micro-batch, each storage once; inputs, parameters
    and buffers do not count. Seconds: of gradients for the inputs alone, for the parameters alone."""

    kept_bytes: int
    input_gradient: float
    weight_gradient: float


def anatomy(
    layer: nn.Module,
    inputs: Sequence[Tensor],
    run: Callable[[], Sequence[Tensor]],
    lap: Callable[[], float],
) -> Anatomy:
    """``run`` gives the layer's outputs for ``inputs``, of which gradients are computed where they want them;
    ``lap`` the seconds since it was last called."""
    best = Anatomy(0, float("inf"), float("inf"))
    for _ in range(RUNS):
        others = {place_of(tensor) for tensor in [*inputs, *layer.parameters(), *layer.buffers()]}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, others: set[int] = others, kept: dict[int, int] = kept) -> Tensor:
            if place_of(tensor) not in others:
                kept[place_of(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = run()
        for output in outputs:
            keep(output)
        lap()
        differentiate_ones(outputs, inputs, keep_graph=True)
        input_gradient = lap()
        differentiate_ones(outputs, [*layer.parameters()])
        weight_gradient = lap()
        best = Anatomy(
            sum(kept.values()),
            min(best.input_gradient, input_gradient),
            min(best.weight_gradient, weight_gradient),
        )
    return best


def place_of(tensor: Tensor) -> int:
    """Where the tensor's storage begins: equal for all views of it."""
    return tensor.untyped_storage().data_ptr()
