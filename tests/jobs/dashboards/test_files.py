"""The files that are made of the dashboards, and that what is committed is what the code makes."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.dashboards.alerts import ALERTS
from jobs.dashboards.files import DASHBOARDS, dashboard_files, kubernetes_files
from jobs.dashboards.panel import Dashboard
from jobs.kubernetes import SHIPPED
from jobs.monitoring import monitoring
from jobs.serving.meter import Meter
from runtime.metrics import Metrics
from tests.support.manifests import OVERLAYS, build, needs_kubectl, only
from tests.support.prometheus import needs_prometheus

WANTED = {
    "reknit-training": {
        "Where the wall time goes",
        "Recoveries, by phase",
        "Workers",
        "Generation",
        "Loss",
        "Gradient norm",
        "Step time",
        "Tokens",
        "Samples",
        "Model FLOPs utilisation (MFU)",
        "Pipeline bubble",
        "Worker skew",
        "Sent, by worker",
        "Snapshot lag",
        "Checkpoint lag",
        "Data wait",
    },
    "reknit-serving": {"Answer latency", "Queue"},
}


def models() -> list[Any]:
    return [pytest.param(json.loads(text), id=name) for name, text in dashboard_files().items()]


def test_what_is_committed_is_what_the_code_makes() -> None:
    committed = {file.name: file.read_text() for file in (SHIPPED / "dashboards").iterdir()}
    remedy = "run: reknit k8s render jobs/recipes/gpt-small.toml --image reknit:0.1.0 --output k8s"
    assert committed == kubernetes_files(), remedy


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda each: each.uid)
def test_every_panel_is_named_once_and_says_what_it_shows(dashboard: Dashboard) -> None:
    counts = Counter(panel.title for panel in dashboard.panels)
    assert max(counts.values()) == 1
    assert WANTED[dashboard.uid] <= counts.keys()
    for panel in dashboard.panels:
        assert panel.unit and panel.description.endswith("."), panel.title
        legends = [series.legend for series in panel.series]
        assert len(set(legends)) == len(legends), panel.title
        assert all("{{run}}" in legend for legend in legends), panel.title
        assert all('run=~"$run"' in series.expr for series in panel.series), panel.title


def test_every_metric_is_one_that_there_is() -> None:
    """Names alone: what they evaluate to is seen where runs are scraped."""
    registry = Metrics("demo").registry
    known = {sample.name for family in registry.collect() for sample in family.samples}
    # without a series until there is a value, or one worker
    known |= {family.name for family in registry.collect()}
    known |= {f"{family.name}_total" for family in registry.collect() if family.type == "counter"}
    replica = {"process": 1} | dict.fromkeys(
        (
            "version",
            "versions",
            "waiting",
            "running",
            "iterations",
            "tokens",
            "prompt_positions",
            "busy_seconds",
        ),
        0.0,
    )
    meter = Meter("demo")
    meter.answered("/v1/caption", 200, 0.1)
    known |= {line.split("{")[0] for line in meter.text([replica], 0).decode().splitlines()}
    used = {
        word
        for dashboard in DASHBOARDS
        for panel in dashboard.panels
        for series in panel.series
        for word in _metrics_in(series.expr)
    } | {word for alert in ALERTS for word in _metrics_in(alert.expr)}
    assert len(used) > 30
    assert used <= known


def _metrics_in(expr: str) -> set[str]:
    words = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in expr).split()
    return {word for word in words if word.startswith("reknit_")}


@pytest.mark.parametrize("model", models())
def test_panels_neither_overlap_nor_leave_the_page(model: dict[str, Any]) -> None:
    panels = model["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


@pytest.mark.parametrize("model", models())
def test_every_query_goes_to_the_chosen_source_and_run(model: dict[str, Any]) -> None:
    names = {variable["name"]: variable for variable in model["templating"]["list"]}
    assert names.keys() == {"datasource", "run"}
    assert names["run"]["query"]["query"].endswith(", run)")
    for panel in model["panels"]:
        for target in panel.get("targets", ()):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert "$run" in target["expr"]
        assert panel["type"] == "row" or panel["fieldConfig"]["defaults"]["unit"]


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_gets_dashboards_and_rules(overlay: str) -> None:
    objects = build(SHIPPED / "overlays" / overlay)
    config = only(objects, "ConfigMap", "reknit-dashboards")
    assert config["data"] == dashboard_files()
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    # kubectl keeps what was applied in an annotation, of which there may be 256 KiB
    assert len(json.dumps(config)) < 200_000
    plain = yaml.safe_load((SHIPPED / "dashboards" / "rules.yaml").read_text())
    assert only(objects, "PrometheusRule")["spec"] == plain


def test_settings_of_ones_own_find_the_runs(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    targets = tmp_path / "targets"
    settings = yaml.safe_load(monitoring(tmp_path / "m", targets=targets, token=token).read_text())
    assert targets.is_dir(), "Prometheus does not watch what is not there"
    train, serve = settings["scrape_configs"]
    assert train["file_sd_configs"][0]["files"] == [f"{targets}/train-*.json"]
    assert serve["authorization"] == {"credentials_file": str(token)}
    assert "secret" not in (tmp_path / "m" / "prometheus.yml").read_text()
    provider = yaml.safe_load((tmp_path / "m" / "grafana" / "dashboards" / "reknit.yaml").read_text())
    (found,) = provider["providers"]
    files = {file.name: file.read_text() for file in Path(found["options"]["path"]).iterdir()}
    assert files == dashboard_files()


def test_a_token_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--serve-token-file"):
        monitoring(tmp_path / "m", token=tmp_path / "nothing")
    assert not (tmp_path / "m").exists()


@needs_prometheus
def test_prometheus_takes_the_settings(tmp_path: Path) -> None:
    settings = monitoring(tmp_path / "m", targets=tmp_path / "targets")
    done = subprocess.run(["promtool", "check", "config", settings], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(ALERTS)} rules found" in done.stdout
