"""What a simulated run is like, and the planner that is brought along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from runtime.detection import Patience
from runtime.layout import Layout
from runtime.signals import PlanChooser, PlanGain, PlanMender
from runtime.simulation.toy import Cut, ToyModel

Stages = int | Literal["auto"]
Planner = Callable[[Layout, int, Stages, int, Cut | None], tuple[PlanChooser, PlanGain, PlanMender]]
"""(layout, micro-batches, stages, chunks, stages that may be skipped) -> how the controller divides work.
The real planner lives in another room, so whoever starts a simulation brings it along."""


@dataclass(frozen=True)
class Settings:
    """``domains[w]`` is the failure domain of the w-th first worker."""

    model: ToyModel
    steps: int
    domains: tuple[str, ...]
    stages: Stages
    min_workers: int = 1
    max_workers: int | None = None
    spares: int = 0
    checkpoint_every: int = 0
    patience: Patience = field(default_factory=Patience)
    salvage: bool = True
    split_backward: bool = False
    """Weight gradients are put off."""
    chunks: int = 1
    """Stages that every worker holds."""
