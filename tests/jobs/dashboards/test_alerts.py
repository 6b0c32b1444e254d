"""Every alert, fired and not fired by Prometheus' own rule tester on series that are written down here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from jobs.dashboards.alerts import ALERTS
from jobs.kubernetes import SHIPPED
from tests.support.prometheus import needs_prometheus

RULES = SHIPPED / "dashboards" / "rules.yaml"
RUN = '{run="demo"}'

CASES: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    # alert: (series of a run that needs help, series of one that does not, when to look)
    # a value a minute: a+bxN begins at a and grows by b, N times
    "ReknitStalled": (
        {"step_time_seconds": "0x20", "step_seconds_sum": "100x20", "step_seconds_count": "10x20"},
        {"step_time_seconds": "0+60x20", "step_seconds_sum": "100x20", "step_seconds_count": "10x20"},
        "10m",
    ),
    "ReknitRepeatedRecoveries": (
        {"recoveries_total": "0+1x20"},
        {"recoveries_total": "0 0 0 0 1 1 1 2 2 2 2 2 2 2 2 2 2 2 2 2 2"},
        "18m",
    ),
    "ReknitStraggler": (
        {"worker_speed_ratio": "0.5x20"},
        {"worker_speed_ratio": "1x20"},
        "10m",
    ),
    "ReknitCheckpointTooOld": (
        {"step": "0+20x20", "checkpoint_step": "0x20", "checkpoint_every_steps": "20x20"},
        {"step": "0+20x20", "checkpoint_step": "0+20x20", "checkpoint_every_steps": "20x20"},
        "15m",
    ),
    "ReknitDataStarvation": (
        {"badput_seconds_total": "0+30x20"},
        {"badput_seconds_total": "0+3x20"},
        "15m",
    ),
}

FURTHER: dict[str, list[tuple[dict[str, str], str]]] = {
    "ReknitStalled": [
        # steps of 200 s may be ten minutes apart; before the first one a run has two minutes
        ({"step_time_seconds": "0x20", "step_seconds_sum": "2000x20", "step_seconds_count": "10x20"}, "20m"),
        ({"step_time_seconds": "0x20", "step_seconds_sum": "0x20", "step_seconds_count": "0x20"}, "2m"),
    ],
    "ReknitStraggler": [({"worker_speed_ratio": "1 1 0.5 0.5 0.5 1x15"}, "6m")],
    "ReknitCheckpointTooOld": [
        # a run that writes its last checkpoint only
        ({"step": "0+20x20", "checkpoint_step": "0x20", "checkpoint_every_steps": "0x20"}, "15m")
    ],
}

LABELS = {"worker_speed_ratio": ', worker="3"', "badput_seconds_total": ', cause="data_wait"'}


def group(alert: str, series: dict[str, str], at: str, *, fires: bool) -> dict[str, object]:
    (found,) = [each for each in ALERTS if each.name == alert]
    labels = {"run": "demo", "severity": found.severity}
    labels |= {"worker": "3"} if alert == "ReknitStraggler" else {}
    return {
        "interval": "1m",
        "input_series": [
            {"series": f'reknit_{name}{{run="demo"{LABELS.get(name, "")}}}', "values": values}
            for name, values in series.items()
        ],
        # of the texts only that they can be made: what they say is for people
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)',
                "eval_time": at,
                "exp_samples": [{"labels": "{}", "value": 1 if fires else 0}],
            }
        ],
    }


def rule_test(folder: Path, groups: list[dict[str, object]]) -> subprocess.CompletedProcess[str]:
    file = folder / "tests.yaml"
    made = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": groups}
    file.write_text(yaml.safe_dump(made))
    return subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)


def test_every_alert_has_its_cases() -> None:
    assert CASES.keys() == {alert.name for alert in ALERTS}


def test_every_alert_says_what_is_the_matter() -> None:
    for alert in ALERTS:
        assert alert.unit and "{{ $value" in alert.description and "{{ $labels.run }}" in alert.summary


@needs_prometheus
def test_the_rules_are_well_formed() -> None:
    done = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


@needs_prometheus
@pytest.mark.parametrize("alert", CASES)
def test_it_fires_and_it_does_not(alert: str, tmp_path: Path) -> None:
    bad, good, at = CASES[alert]
    groups = [group(alert, bad, at, fires=True), group(alert, good, at, fires=False)]
    groups += [group(alert, series, when, fires=False) for series, when in FURTHER.get(alert, [])]
    done = rule_test(tmp_path, groups)
    assert done.returncode == 0, done.stdout + done.stderr
    # and the tester would have said so if it had not
    assert rule_test(tmp_path, [group(alert, good, at, fires=True)]).returncode != 0
