from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from runtime.protocol import Measured
from runtime.worker_metrics import PARTS, WorkerMetrics, parts_of

SECONDS = {
    "pipeline": 1.0,
    "wait_peers": 0.25,
    "wait_data": 0.125,
    "reduce": 0.5,
    "exchange": 0.375,
    "wait_backups": 0.25,
    "optimizer": 0.0625,
    "gather": 0.03125,
    "backup_lag": 0.75,
}


def told(worker: int, step: int = 1) -> Measured:
    fabric = {"sent": 100 * step, "received": 10 * step}
    return Measured(worker, step, {}, {}, SECONDS, {"shards": 7}, fabric)


def made() -> tuple[CollectorRegistry, WorkerMetrics]:
    registry, metrics = CollectorRegistry(), WorkerMetrics("demo")
    registry.register(metrics)
    return registry, metrics


def test_no_second_is_in_two_parts() -> None:
    parts = parts_of(SECONDS)
    assert tuple(parts) == PARTS
    whole = ("pipeline", "reduce", "exchange", "optimizer", "gather")
    assert sum(parts.values()) == sum(SECONDS[each] for each in whole)
    assert (parts["compute"], parts["bubble"], parts["snapshot"]) == (0.625, 0.25, 0.25)


def test_steps_add_up() -> None:
    registry, metrics = made()
    metrics.keep([0, 1])
    metrics.observe(told(1, 1), 1.0)
    metrics.observe(told(1, 2), 0.5)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"reknit_worker_{name}", {"run": "demo", "worker": "1", **labels})

    assert value("steps_total") == 2
    assert value("seconds_total", part="compute") == 1.25
    assert value("fabric_bytes_total", direction="sent") == 200
    assert value("fabric_bytes_total", direction="received") == 20
    assert value("memory_bytes", kind="shards") == 7
    assert value("snapshot_lag_seconds") == 0.75
    assert value("speed_ratio") == 0.5


def test_who_leaves_takes_its_series_along() -> None:
    registry, metrics = made()
    metrics.keep([0, 1, 2])
    for worker in range(3):
        metrics.observe(told(worker), 1.0)
    metrics.keep([0, 2])
    metrics.observe(told(1), 1.0)
    text = generate_latest(registry).decode()
    assert 'worker="0"' in text and 'worker="2"' in text
    assert 'worker="1"' not in text
    assert registry.get_sample_value("reknit_worker_steps_total", {"run": "demo", "worker": "0"}) == 1


def test_a_newcomer_has_its_series_at_once() -> None:
    """Counters that begin at zero: a rate over the first step is one."""
    registry, metrics = made()
    metrics.keep([3])
    assert registry.get_sample_value("reknit_worker_steps_total", {"run": "demo", "worker": "3"}) == 0
