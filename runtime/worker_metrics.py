"""What each worker of a run tells Prometheus: series with the labels ``run`` and ``worker``, which are there
while the worker has work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from runtime.plan import WorkerId
from runtime.protocol import Measured

PARTS = ("compute", "bubble", "data_wait", "reduce", "exchange", "snapshot", "optimizer", "gather")
"""Where a worker's seconds go: forward and backward; waiting for the stages beside it; waiting for data;
summing gradients; the small exchange at the end; waiting in it for the copies of the last version; the
optimizer; spreading the new parameters."""


def parts_of(seconds: Mapping[str, float]) -> dict[str, float]:
    """A step's seconds (``strategies.step.StepSeconds``) cut up so that no part is in another one."""
    waits = seconds.get("wait_peers", 0.0), seconds.get("wait_data", 0.0)
    copies = seconds.get("wait_backups", 0.0)
    return {
        "compute": max(0.0, seconds.get("pipeline", 0.0) - sum(waits)),
        "bubble": waits[0],
        "data_wait": waits[1],
        "reduce": seconds.get("reduce", 0.0),
        "exchange": max(0.0, seconds.get("exchange", 0.0) - copies),
        "snapshot": copies,
        "optimizer": seconds.get("optimizer", 0.0),
        "gather": seconds.get("gather", 0.0),
    }


@dataclass
class _Told:
    """Of one worker, so far. ``fabric`` counts from the worker's own beginning."""

    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    fabric: Mapping[str, int] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    snapshot_lag: float = 0.0
    speed: float = 1.0
    peak_flops: float | None = None


class WorkerMetrics(Collector):
    """Written by one thread, collected by any."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._told: dict[WorkerId, _Told] = {}

    def keep(self, workers: Iterable[WorkerId]) -> None:
        """These have work now, nobody else."""
        self._told = {worker: self._told.get(worker, _Told()) for worker in workers}

    def observe(self, measured: Measured, speed: float) -> bool:
        """Takes in a worker's step; ``speed`` is its own beside the usual one (1.0). One that has left the
        run meanwhile is not heard. Returns whether ``peaks`` are others now."""
        told = self._told.get(measured.worker)
        if told is None:
            return False
        before = (told.steps > 0, told.peak_flops)
        told.steps += 1
        for part, seconds in parts_of(measured.seconds).items():
            told.seconds[part] += seconds
        told.fabric, told.memory = measured.fabric_bytes, measured.resident_bytes
        told.snapshot_lag = measured.seconds.get("backup_lag", 0.0)
        told.speed, told.peak_flops = speed, measured.peak_flops
        return before != (True, told.peak_flops)

    def peaks(self) -> list[float | None]:
        """FLOP/s of every worker that has told of a step."""
        return [told.peak_flops for told in self._told.values() if told.steps]

    def collect(self) -> Iterator[Metric]:
        every = [(str(worker), told) for worker, told in self._told.items()]

        def counter(name: str, text: str, label: str | None = None) -> CounterMetricFamily:
            return CounterMetricFamily(f"reknit_worker_{name}", text, labels=_labels(label))

        def gauge(name: str, text: str, label: str | None = None) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"reknit_worker_{name}", text, labels=_labels(label))

        steps = counter("steps", "Steps that the worker took part in")
        seconds = counter("seconds", "Seconds of the worker's steps, by what it did", "part")
        fabric = counter("fabric_bytes", "Bytes over the fabric since the worker began", "direction")
        memory = gauge("memory_bytes", "Bytes that the worker keeps, by what for", "kind")
        lag = gauge("snapshot_lag_seconds", "From a version's end until the copies of it kept here had come")
        speed = gauge("speed_ratio", "Speed beside that of the others: 0.5 takes twice as long")
        for worker, told in every:
            labels = [self._run, worker]
            steps.add_metric(labels, told.steps)
            for part, spent in told.seconds.items():
                seconds.add_metric([*labels, part], spent)
            for direction, count in told.fabric.items():
                fabric.add_metric([*labels, direction], count)
            for kind, size in told.memory.items():
                memory.add_metric([*labels, kind], size)
            lag.add_metric(labels, told.snapshot_lag)
            speed.add_metric(labels, told.speed)
        yield from (steps, seconds, fabric, memory, lag, speed)


def _labels(further: str | None) -> list[str]:
    return ["run", "worker", *([further] if further else [])]
