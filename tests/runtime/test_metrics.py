from __future__ import annotations

import socket
from dataclasses import replace
from urllib.request import urlopen

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from runtime.events import (
    CheckpointWritten,
    Paused,
    Recovered,
    RecoverySeconds,
    RunStarted,
    StepRecord,
    StepRepeated,
    WorkerJoined,
)
from runtime.goodput import Ledger
from runtime.metrics import Metrics
from runtime.protocol import Measured

SECOND = 1_000_000_000
STEP = StepRecord(7, 2.5, 1.25, 0.001, 8, 64, 0.2, 4, 2, 17, held_out_loss=3.0, attempts=2)
RECOVERED = Recovered(
    41, (3,), "process died", 4, 3, RecoverySeconds(0.01, 0.02, 0.0, 0.01, 0.05), "peers", 41, 1
)


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Samples by (name, run, other label values)."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            others = [value for label, value in sorted(sample.labels.items()) if label != "run"]
            found[(sample.name, sample.labels["run"], *others)] = sample.value
    return found


def test_what_is_observed_is_scraped() -> None:
    metrics = Metrics("demo", checkpoint_every=20)
    port = metrics.serve()
    try:
        before = scrape(port)
        assert before["reknit_recovery_seconds_total", "demo", "detect"] == 0.0
        assert before["reknit_badput_seconds_total", "demo", "recovery_detect"] == 0.0
        metrics.observe_event(RunStarted("demo", 80, 4, 2), 1000.0)
        metrics.observe_step(STEP)
        metrics.observe_step(
            replace(STEP, step=8, loss=2.0, attempts=1, held_out_loss=None, committed_at=1001.5)
        )
        metrics.observe_event(RECOVERED, 1001.0)
        metrics.observe_event(CheckpointWritten(8, 100, 0.1), 1002.0)
        metrics.observe_event(StepRepeated(8, 2), 1003.0)
        ledger = Ledger.begin(0).enter(10 * SECOND, "productive").commit(40 * SECOND)
        metrics.observe_ledger(ledger)
        after = scrape(port)
    finally:
        metrics.close()
    assert {name for _, name, *_ in after} == {"demo"}
    expected = {
        ("reknit_step",): 8,
        ("reknit_loss",): 2.0,
        ("reknit_held_out_loss",): 3.0,
        ("reknit_gradient_norm",): 1.25,
        ("reknit_learning_rate",): 0.001,
        ("reknit_workers",): 3,
        ("reknit_generation",): 2,
        ("reknit_checkpoint_step",): 8,
        ("reknit_checkpoint_time_seconds",): 1002.0,
        ("reknit_checkpoint_every_steps",): 20,
        ("reknit_target_step",): 80,
        ("reknit_step_time_seconds",): 1001.5,
        ("reknit_tokens_total",): 128,
        ("reknit_samples_total",): 16,
        ("reknit_step_repeats_total",): 1,
        ("reknit_step_seconds_count",): 2,
        ("reknit_step_seconds_bucket", "0.1"): 0,
        ("reknit_step_seconds_bucket", "0.25"): 2,
        ("reknit_recoveries_total",): 1,
        ("reknit_recovery_seconds_total", "detect"): 0.01,
        ("reknit_recovery_seconds_total", "redo"): 0.05,
        ("reknit_goodput_ratio",): 0.75,
        ("reknit_goodput_seconds_total",): 30,
        ("reknit_badput_seconds_total", "initialisation"): 10,
        ("reknit_badput_seconds_total", "paused"): 0,
    }
    assert {key: after.get((key[0], "demo", *key[1:])) for key in expected} == expected


def test_workers_follow_the_events() -> None:
    metrics = Metrics("demo")
    for event, workers in (
        (WorkerJoined(3, 4, 4, 5, 0.1), 5),
        (RECOVERED, 3),
        (Paused(9, 1, 2), 1),
    ):
        metrics.observe_event(event, 5.0)
        assert metrics.registry.get_sample_value("reknit_workers", {"run": "demo"}) == workers


def test_a_recovery_without_a_loss_is_no_recovery_of_a_worker() -> None:
    metrics = Metrics("demo")
    metrics.observe_event(replace(RECOVERED, lost=(), reason="worker slow"), 5.0)
    assert metrics.registry.get_sample_value("reknit_recoveries_total", {"run": "demo"}) == 0


def test_counters_never_fall() -> None:
    metrics = Metrics("demo")

    def goodput() -> float | None:
        return metrics.registry.get_sample_value("reknit_goodput_seconds_total", {"run": "demo"})

    ledger = Ledger.begin(0, "productive").commit(10 * SECOND)
    metrics.observe_ledger(ledger.at(15 * SECOND))
    assert goodput() == 10.0
    ledger = ledger.move("productive", "wasted_progress", 4 * SECOND)
    metrics.observe_ledger(ledger)
    assert goodput() == 10.0
    assert metrics.registry.get_sample_value("reknit_goodput_ratio", {"run": "demo"}) == 0.6
    metrics.observe_ledger(ledger.commit(15 * SECOND))
    assert goodput() == 11.0


@pytest.mark.parametrize(
    "name", ["loss", "held_out_loss", "gradient_norm", "model_flops_total", "peak_flops"]
)
def test_what_is_not_known_yet_has_no_series(name: str) -> None:
    metrics = Metrics("demo")
    metrics.observe_event(RunStarted("demo", 80, 4, 2), 5.0)
    assert metrics.registry.get_sample_value(f"reknit_{name}", {"run": "demo"}) is None


def test_a_resumed_run_begins_where_its_checkpoint_is() -> None:
    metrics = Metrics("demo", checkpoint_every=10)
    metrics.observe_event(RunStarted("demo", 80, 4, 2, from_version=30, source="checkpoint"), 5.0)
    for name in ("step", "checkpoint_step"):
        assert metrics.registry.get_sample_value(f"reknit_{name}", {"run": "demo"}) == 30


# Model FLOPs utilisation: what was computed, over what could have been.


def peak(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("reknit_peak_flops", {"run": "demo"})


def told(worker: int, peak_flops: float | None) -> Measured:
    return Measured(worker, 1, {}, {}, step_flops=1000, peak_flops=peak_flops)


def test_flops_of_committed_steps_are_added_up() -> None:
    metrics = Metrics("demo")
    metrics.observe_members([0])
    metrics.observe_step(STEP)
    metrics.observe_worker(told(0, None), 1.0)
    metrics.observe_step(STEP)
    metrics.observe_step(STEP)
    assert metrics.registry.get_sample_value("reknit_model_flops_total", {"run": "demo"}) == 2000
    assert peak(metrics) is None, "a device that is not known has no peak"


def test_the_peak_is_that_of_all_who_have_work() -> None:
    metrics = Metrics("demo")
    metrics.observe_members([0, 1, 2])
    metrics.observe_worker(told(0, 100.0), 1.0)
    metrics.observe_worker(told(1, 50.0), 1.0)
    assert peak(metrics) == 150.0
    metrics.observe_members([0, 2])
    assert peak(metrics) == 100.0
    metrics.observe_worker(told(1, 50.0), 1.0)
    assert peak(metrics) == 100.0, "what a worker says that has left"
    metrics.observe_worker(told(2, None), 1.0)
    assert peak(metrics) is None, "the peak of one is not known"


def test_a_given_peak_takes_the_place_of_a_devices_share() -> None:
    shared, given = Metrics("demo", device_share=0.5), Metrics("demo", peak_flops=7.0, device_share=0.5)
    for metrics in (shared, given):
        metrics.observe_members([0])
        metrics.observe_worker(told(0, 100.0), 1.0)
    assert (peak(shared), peak(given)) == (50.0, 7.0)


def test_runs_do_not_share_anything_and_leave_the_default_registry_alone() -> None:
    before = set(REGISTRY._names_to_collectors)
    first, second = Metrics("one"), Metrics("two")
    first.observe_step(STEP)
    assert first.registry.get_sample_value("reknit_loss", {"run": "one"}) == 2.5
    assert second.registry.get_sample_value("reknit_step", {"run": "two"}) == 0.0
    assert set(REGISTRY._names_to_collectors) == before


def test_the_port_is_freed_and_a_taken_one_is_a_clear_error() -> None:
    metrics, other = Metrics("one"), Metrics("two")
    port = metrics.serve()
    with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{port} .*set metrics\.port to a free port"):
        other.serve(port)
    other.close()
    metrics.close()
    metrics.close()
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", port))
    assert metrics.serve(port) == port
    metrics.close()
