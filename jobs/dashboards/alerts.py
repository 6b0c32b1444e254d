"""What somebody should be told of without looking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["warning", "critical"]


@dataclass(frozen=True, slots=True)
class Alert:
    """Fires where ``expr`` has had a value for ``lasting``; ``unit`` is the value's. In the texts,
    ``{{ $labels.run }}`` and ``{{ $value }}`` stand for what they say."""

    name: str
    expr: str
    lasting: str
    severity: Severity
    unit: str
    summary: str
    description: str


ALERTS = (
    Alert(
        "ReknitStalled",
        "time() - reknit_step_time_seconds > 120 + 10 * reknit_step_seconds_sum / "
        "clamp_min(reknit_step_seconds_count, 1)",
        "1m",
        "critical",
        "seconds",
        "{{ $labels.run }} commits no steps",
        "The newest step was committed {{ $value | humanizeDuration }} ago: two minutes and ten usual steps "
        "are exceeded. The run waits for workers, for data or for storage: its event log says which.",
    ),
    Alert(
        "ReknitRepeatedRecoveries",
        "increase(reknit_recoveries_total[15m]) > 3",
        "0s",
        "warning",
        "recoveries",
        "{{ $labels.run }} loses workers again and again",
        "{{ $value | humanize }} recoveries within 15 minutes. Its event log names the workers and the "
        "reasons: machines that are taken away, too little memory, or a fault that comes back.",
    ),
    Alert(
        "ReknitStraggler",
        "reknit_worker_speed_ratio < 0.8",
        "5m",
        "warning",
        "ratio",
        "Worker {{ $labels.worker }} of {{ $labels.run }} is slow",
        "For five minutes it has had {{ $value | humanizePercentage }} of the others' speed for the same "
        "layers. The plan gives it less work; its machine may be shared, hot or throttled.",
    ),
    Alert(
        "ReknitCheckpointTooOld",
        "(reknit_step - reknit_checkpoint_step > 3 * reknit_checkpoint_every_steps) "
        "and reknit_checkpoint_every_steps > 0",
        "5m",
        "critical",
        "steps",
        "{{ $labels.run }} writes no checkpoints",
        "The newest durable checkpoint is {{ $value | humanize }} steps behind, more than three intervals. "
        "Losing a shard together with its backup would cost all of them; the event log names the problem.",
    ),
    Alert(
        "ReknitDataStarvation",
        'sum by (run) (rate(reknit_badput_seconds_total{cause="data_wait"}[5m])) > 0.1',
        "5m",
        "warning",
        "share of the wall time",
        "{{ $labels.run }} waits for data",
        "{{ $value | humanizePercentage }} of the wall time goes into waiting for data: raise "
        "data.feed_workers, or see to the storage that the data set lies on.",
    ),
)


def groups() -> dict[str, Any]:
    """All alerts as Prometheus reads them from a rules file, and its operator from a PrometheusRule."""
    return {
        "groups": [
            {
                "name": "reknit",
                "rules": [
                    {
                        "alert": alert.name,
                        "expr": alert.expr,
                        "for": alert.lasting,
                        "labels": {"severity": alert.severity},
                        "annotations": {
                            "summary": alert.summary,
                            "description": alert.description,
                            "unit": alert.unit,
                        },
                    }
                    for alert in ALERTS
                ],
            }
        ]
    }
