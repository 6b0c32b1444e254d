"""What workers measured: seconds per layer, and how fast each worker is beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from runtime.plan import WorkerId
from runtime.protocol import Measured

WINDOW = 16
"""Measurements that a median is taken over."""

NOISE = 0.25
"""A worker within this relative distance of the others counts as equally fast."""


@dataclass
class Speeds:
    """Medians over the last measurements. Seconds are per layer and micro-batch."""

    _forward: dict[int, list[float]] = field(default_factory=dict)
    _backward: dict[int, list[float]] = field(default_factory=dict)
    _ratios: dict[WorkerId, list[float]] = field(default_factory=dict)

    def warm_up(self, forward: Sequence[float], backward: Sequence[float]) -> None:
        """Takes in a worker's first profile: one entry for every layer."""
        for layer, seconds in enumerate(forward):
            _append(self._forward.setdefault(layer, []), seconds)
        for layer, seconds in enumerate(backward):
            _append(self._backward.setdefault(layer, []), seconds)

    def observe(self, report: Measured) -> None:
        """Takes in what a worker measured over its last step."""
        usual = sum(self.forward(layer) + self.backward(layer) for layer in report.backward)
        taken = sum(report.forward.get(layer, 0.0) + report.backward[layer] for layer in report.backward)
        if usual > 0 and taken > 0:
            _append(self._ratios.setdefault(report.worker, []), taken / usual)
        for layer, seconds in report.forward.items():
            _append(self._forward.setdefault(layer, []), seconds)
        for layer, seconds in report.backward.items():
            _append(self._backward.setdefault(layer, []), seconds)

    def forward(self, layer: int) -> float:
        return median(self._forward[layer]) if self._forward.get(layer) else 1e-3

    def backward(self, layer: int) -> float:
        return median(self._backward[layer]) if self._backward.get(layer) else 2e-3

    def of(self, worker: WorkerId) -> float:
        """The worker's speed beside the typical one: 1.0 = typical, 0.5 = takes twice as long."""
        if len(self._ratios.get(worker, [])) < WINDOW // 2:
            return 1.0
        typical = median(median(ratios) for ratios in self._ratios.values())
        speed = typical / median(self._ratios[worker])
        return 1.0 if abs(speed - 1.0) <= NOISE else speed


def _append(values: list[float], value: float) -> None:
    values.append(value)
    del values[:-WINDOW]
