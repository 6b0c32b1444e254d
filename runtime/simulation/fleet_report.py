"""What a fleet is like and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.signals import Terms


@dataclass(frozen=True)
class FleetSettings:
    """``layer_seconds``: forward, per layer and micro-batch; backward takes twice as long."""

    terms: Terms
    micro_batches: int
    workers_per_node: int = 8
    layer_seconds: float = 0.01
    link_bytes_per_second: float = 5e9
    detect_seconds: float = 0.05
    warm_up_seconds: float = 30.0
    checkpoint_seconds: float = 60.0
    checkpoint_write_seconds: float = 5.0
    storage_bytes_per_second: float = 1e9


@dataclass
class FleetReport:
    """Seconds are simulated ones, but for ``planning`` and ``deciding``: the processor time of
    each call of the planner, and of each decision of the controller that led to a new plan (the planner's
    part included)."""

    seconds: float = 0.0
    steps: int = 0
    productive: float = 0.0
    lost_nodes: int = 0
    lost_workers: int = 0
    recoveries: int = 0
    from_checkpoint: int = 0
    changes: int = 0
    joined: int = 0
    released: int = 0
    repeated_steps: int = 0
    taken_back: int = 0
    least_workers: int = 0
    planning: list[float] = field(default_factory=list)
    deciding: list[float] = field(default_factory=list)
    recovery_seconds: list[float] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """The share of the time that went into steps that count."""
        return self.productive / self.seconds if self.seconds else 0.0
