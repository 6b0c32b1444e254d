"""What workers measured: seconds per layer, and how fast each worker is beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, median_high, median_low
from typing import TypeVar

from runtime.plan import WorkerId
from runtime.protocol import Linked, Measured

T = TypeVar("T")

WINDOW = 16
"""Measurements that a layer's median is taken over."""

RECENT = 8
"""Steps that a worker's median is taken over, and that it must have been measured for."""

UNKNOWN = (1e-3, 2e-3)
"""What a layer is taken to take, forward and backward, before anybody has profiled it."""

NOISE = 0.25
"""A worker within this relative distance of the others counts as equally fast."""


@dataclass(frozen=True, slots=True)
class _Latest:
    """What a worker's last report said: its step, the layers, and its seconds over the profile's."""

    step: int
    layers: tuple[int, ...]
    ratio: float


@dataclass
class Speeds:
    """Medians over the last measurements. Seconds are per layer and micro-batch.

    A worker takes longer than the profile says either because it is slow or because its layers are. Where
    several workers hold the same layers, what they have in common is the layers', and what is beyond that is
    each one's own; one that holds them alone is compared with all. The seconds of a worker that is slow by
    itself are not counted as its layers', or the layers would seem to become slow and the worker usual again.
    """

    _profile: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    _forward: dict[int, list[float]] = field(default_factory=dict)
    _backward: dict[int, list[float]] = field(default_factory=dict)
    _own: dict[WorkerId, list[float]] = field(default_factory=dict)
    _latest: dict[WorkerId, _Latest] = field(default_factory=dict)
    _links: dict[WorkerId, Linked] = field(default_factory=dict)
    _common: dict[tuple[int, ...], tuple[int, float]] = field(default_factory=dict)

    def warm_up(self, forward: Sequence[float], backward: Sequence[float]) -> None:
        """Takes in a worker's first profile: one entry for every layer."""
        for layer, seconds in enumerate(zip(forward, backward, strict=True)):
            _append(self._profile.setdefault(layer, []), seconds, WINDOW)

    def observe(self, report: Measured) -> None:
        """Takes in what a worker measured over its last step."""
        taken = sum(report.forward.get(layer, 0.0) + report.backward[layer] for layer in report.backward)
        usual = sum(sum(self._profiled(layer)) for layer in report.backward)
        if usual > 0 and taken > 0:
            latest = _Latest(report.step, tuple(sorted(report.backward)), taken / usual)
            self._latest[report.worker] = latest
            own = latest.ratio / self._common_ratio(latest)
            _append(self._own.setdefault(report.worker, []), own, RECENT)
            if abs(1.0 / own - 1.0) > NOISE:
                return
        for layer, seconds in report.forward.items():
            _append(self._forward.setdefault(layer, []), seconds, WINDOW)
        for layer, seconds in report.backward.items():
            _append(self._backward.setdefault(layer, []), seconds, WINDOW)

    def link(self, report: Linked) -> None:
        """Takes in what a worker measured of one of its links."""
        self._links[report.worker] = report

    def forget(self, worker: WorkerId) -> None:
        """It is no longer one of the run's, and neither is its link."""
        self._links.pop(worker, None)
        self._own.pop(worker, None)
        self._latest.pop(worker, None)

    @property
    def bytes_per_second(self) -> float | None:
        """What a usual link carries; None before one was measured. The lower median: one of two that seems
        faster than it is would count half otherwise."""
        rates = [link.bytes_per_second for link in self._links.values()]
        return median_low(rates) if rates else None

    @property
    def seconds_per_message(self) -> float:
        """What a usual link takes for a message, however short; 0.0 before one was measured. The upper
        median, for the same reason."""
        return median_high([link.seconds_per_message for link in self._links.values()] or [0.0])

    def _common_ratio(self, latest: _Latest) -> float:
        """How much longer than profiled a usual worker takes for the same layers: of those that hold them
        the lower median, for a slow one of two must not make the layers slow. As it is when the first of
        them reports a step, or thousands would each be compared with thousands."""
        step, common = self._common.get(latest.layers, (None, 1.0))
        if step != latest.step:
            present = [each for each in self._latest.values() if each.step >= latest.step - 1]
            peers = [each.ratio for each in present if each.layers == latest.layers]
            common = median_low(peers if len(peers) > 1 else [each.ratio for each in present])
            self._common[latest.layers] = latest.step, common
        return common

    def _profiled(self, layer: int) -> tuple[float, float]:
        """(forward, backward). It stays what it is while workers are measured: what they are compared with
        must not follow them."""
        profile = self._profile.get(layer)
        if not profile:
            return UNKNOWN
        return median(forward for forward, _ in profile), median(backward for _, backward in profile)

    def forward(self, layer: int) -> float:
        return median(self._forward[layer]) if self._forward.get(layer) else self._profiled(layer)[0]

    def backward(self, layer: int) -> float:
        return median(self._backward[layer]) if self._backward.get(layer) else self._profiled(layer)[1]

    def of(self, worker: WorkerId) -> float:
        """The worker's speed beside the usual one: 1.0 = usual, 0.5 = takes twice as long."""
        own = self._own.get(worker, [])
        if len(own) < RECENT:
            return 1.0
        speed = 1.0 / median(own)
        return 1.0 if abs(speed - 1.0) <= NOISE else speed


def _append(values: list[T], value: T, most: int) -> None:
    values.append(value)
    del values[:-most]
