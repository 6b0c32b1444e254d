"""What every worker tells every other at the end of a step, and what all conclude from it.

The shares travel in one exchange a step. All workers draw the same conclusions from the same shares, so
the decision to commit, to repeat or to stop needs no leader.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from runtime.exact import (
    combine_squared_norms,
    first_non_finite,
    next_exponents,
    overflowed,
)
from runtime.fabric.notes import carry
from runtime.layout import Layout
from runtime.samples import Samples, StepSamples
from strategies.salvage import Losses

FINGERPRINT_MODULUS = 1 << 64


class NonFiniteGradient(ValueError):
    """A gradient is NaN or infinite: training has diverged and cannot go on."""


@dataclass(slots=True)
class Share:
    """One worker's part of a step's outcome.

    ``maxima_T`` are the largest |gradient| of each tensor; ``squared`` the squared norms of the shards it
    owns, by tensor (exact integers; floats in fast mode); ``fingerprint`` is that of its owned parameters as
    the step began; ``change`` the generation of the change of plan that this worker knows of, or 0;
    ``half_depth`` as ``held_out``, by half the stages; ``samples`` those of the micro-batches in ``losses``,
    where the data tells them.
    """

    losses: Losses = field(default_factory=dict)
    samples: dict[int, Samples] = field(default_factory=dict)
    held_out: Losses = field(default_factory=dict)
    half_depth: Losses = field(default_factory=dict)
    maxima_T: np.ndarray | None = None
    squared: dict[int, int | float] = field(default_factory=dict)
    fingerprint: int = 0
    stop: bool = False
    change: int = 0


carry(Share)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all shares together say. ``change`` is the generation of the change of plan that follows this
    step, 0 where there is none: all workers must know of it."""

    loss: float
    count: int
    held_out_loss: float | None
    fingerprint: int
    stop: bool
    change: int = 0
    read: StepSamples = ()
    half_depth_loss: float | None = None


def outcome(shares: Iterable[Share]) -> Outcome:
    """Losses are added in the order of the micro-batches, rounded once (``math.fsum``)."""
    shares = list(shares)
    loss, count = _mean(share.losses for share in shares)
    held_out, held_out_count = _mean(share.held_out for share in shares)
    half_depth, half_depth_count = _mean(share.half_depth for share in shares)
    return Outcome(
        loss=loss,
        count=count,
        held_out_loss=held_out if held_out_count else None,
        fingerprint=sum(share.fingerprint for share in shares) % FINGERPRINT_MODULUS,
        stop=any(share.stop for share in shares),
        change=min((share.change for share in shares), default=0),
        half_depth_loss=half_depth if half_depth_count else None,
        # not a mapping: were a micro-batch counted twice, the ledger would have to show it
        read=tuple(sorted(each for share in shares for each in share.samples.items())),
    )


def _mean(parts: Iterable[Losses]) -> tuple[float, int]:
    losses = [value for part in parts for value in part.values()]
    count = sum(n for _, n in losses)
    return (math.fsum(loss for loss, _ in losses) / count if count else 0.0), count


def largest(shares: Iterable[Share]) -> torch.Tensor:
    """The elementwise maximum of all workers' maxima. NaN stays NaN."""
    maxima = [share.maxima_T for share in shares if share.maxima_T is not None]
    return torch.from_numpy(np.maximum.reduce(maxima))


def contributions(layout: Layout, micro_batches: int) -> list[int]:
    """How many gradients are summed in each tensor in a step: one per micro-batch and layer using it."""
    layers = {tensor.index: len(block.layers) for block in layout.blocks for tensor in block.tensors}
    return [micro_batches * layers[index] for index in range(len(layers))]


def exponents_after(
    layout: Layout,
    maxima_T: torch.Tensor,
    current: Sequence[int] | None,
    counts: Sequence[int],
    step: int,
) -> tuple[bool, tuple[int, ...]]:
    """(whether this step's sums are exact, the exponents for the next try or step).

    Raises NonFiniteGradient, which names the tensor.
    """
    broken = first_non_finite(maxima_T)
    if broken is not None:
        raise NonFiniteGradient(
            f"step {step}: the gradient of {layout.tensors[broken].name} is not finite; lower "
            "optimizer.learning_rate, set optimizer.clip_norm, or check the data and the model"
        )
    following = tuple(next_exponents(maxima_T, counts).tolist())
    if current is None:
        return False, following
    fits = not overflowed(maxima_T, torch.tensor(current, dtype=torch.int64), counts)
    return fits, following


def gradient_norm(
    shares: Sequence[Share], exponents: Mapping[int, int] | Sequence[int] | None, count: int
) -> float:
    """The norm of the mean gradient: exact sums rounded once, or (``exponents`` None) plain floats."""
    totals: dict[int, int | float] = {}
    for share in shares:
        for tensor, squared in share.squared.items():
            totals[tensor] = totals.get(tensor, 0) + squared
    if exponents is None:
        return math.sqrt(math.fsum(totals.values())) / count
    tensors = sorted(totals)
    squared_norm = combine_squared_norms(
        [int(totals[tensor]) for tensor in tensors], [exponents[tensor] for tensor in tensors]
    )
    return math.sqrt(squared_norm) / count
