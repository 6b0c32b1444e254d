"""What the controller of a run is told beside the job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from actors.crew import Place
from actors.exposition import MetricsSettings
from actors.feed import EMPTY_SECONDS
from runtime.detection import Patience


@dataclass(frozen=True, slots=True)
class RunSettings:
    """``recipe``: the digest of what decides the bits; ``name``: how all its actors' names begin."""

    folder: str
    workers: int
    min_workers: int
    stages: int | Literal["auto"]
    keep: int
    recipe: str
    resume: bool
    metrics: MetricsSettings
    name: str
    place: Place
    feed_cpus: float = 1.0
    feed_empty_seconds: float = EMPTY_SECONDS
    max_workers: int | None = None
    spares: int = 0
    rebalance: bool = True
    patience: Patience = field(default_factory=Patience)
