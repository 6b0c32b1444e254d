"""What a run must give, bit for bit: the plain reference loop on the same model and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from jobs.reference import Reference, ReferenceStep
from strategies.options import OptimizerSettings
from tests.support.cluster import OPTIMIZER
from tests.support.models import Tokens, build

Bits = list[tuple[float, float, int]]
"""Loss, gradient norm and fingerprint of every step, as ``Result.bits`` has them."""


def reference_steps(
    steps: int = 5,
    *,
    build_model: Callable[[], Any] = build,
    data: Any = None,
    seed: int = 7,
    micro_batches: int = 5,
    autocast: bool = False,
    optimizer: OptimizerSettings = OPTIMIZER,
    orders: Sequence[Sequence[int]] | None = None,
    slices: int = 1,
) -> list[ReferenceStep]:
    """The defaults are those of ``toy_job``."""
    torch.manual_seed(seed)
    layers, loss = build_model()
    reference = Reference(
        layers,
        loss,
        (data or Tokens(5)).micro_batch,
        seed=seed,
        micro_batches=micro_batches,
        settings=optimizer,
        autocast=autocast,
        orders=orders,
        slices=slices,
    )
    return [reference.step() for _ in range(steps)]


def reference_bits(steps: int = 5, **changes: Any) -> Bits:
    return [(s.loss, s.grad_norm, s.fingerprint) for s in reference_steps(steps, **changes)]


@cache
def toy_bits(steps: int = 5) -> Bits:
    """The bits of ``toy_job`` as it is."""
    return reference_bits(steps)
