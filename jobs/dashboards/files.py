"""The files that Prometheus, Grafana and Kubernetes read: names and contents, nothing is written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.dashboards.alerts import groups
from jobs.dashboards.grafana import to_json
from jobs.dashboards.serving import SERVING
from jobs.dashboards.training import TRAINING
from jobs.yaml_text import to_yaml
from runtime.targets import pattern

DASHBOARDS = (TRAINING, SERVING)
RULES = "rules.yaml"
LOCAL = "reknit monitoring"
PROMETHEUS = "http://localhost:9090"
"""Where Grafana asks by default."""


def dashboard_files() -> dict[str, str]:
    """Every dashboard's JSON."""
    return {f"{dashboard.uid}.json": to_json(dashboard) for dashboard in DASHBOARDS}


def kubernetes_files() -> dict[str, str]:
    """A kustomization: a ConfigMap of dashboards, as Grafana's sidecar looks for them, and the alerts."""
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["prometheusrule.yaml"],
        "configMapGenerator": [
            {
                "name": "reknit-dashboards",
                "files": sorted(dashboard_files()),
                "options": {
                    "disableNameSuffixHash": True,
                    "labels": {"grafana_dashboard": "1"},
                    "annotations": {"grafana_folder": "Reknit"},
                },
            }
        ],
    }
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "reknit"},
        "spec": groups(),
    }
    return {
        **dashboard_files(),
        "kustomization.yaml": to_yaml(kustomization),
        "prometheusrule.yaml": to_yaml(rule),
        RULES: to_yaml(groups()),
    }


def local_files(
    folder: Path, targets: Path, *, interval: str = "5s", token: Path | None = None
) -> dict[str, str]:
    """Settings for a Prometheus and a Grafana of one's own, to lie in ``folder``: runs and services are found
    in ``targets``. ``token`` is a file with the bearer token that services ask for."""

    def job(name: str, files: str) -> dict[str, Any]:
        return {"job_name": name, "file_sd_configs": [{"files": [files], "refresh_interval": "10s"}]}

    services = job("reknit-serve", pattern(targets, "serve"))
    if token is not None:
        services["authorization"] = {"credentials_file": str(token)}
    prometheus = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [RULES],
        "scrape_configs": [job("reknit", pattern(targets, "train")), services],
    }
    source = {
        "apiVersion": 1,
        "datasources": [
            {
                "name": "Prometheus",
                "type": "prometheus",
                "access": "proxy",
                "url": PROMETHEUS,
                "isDefault": True,
                "jsonData": {"timeInterval": interval},
            }
        ],
    }
    provider = {
        "apiVersion": 1,
        "providers": [
            {
                "name": "Reknit",
                "folder": "Reknit",
                "type": "file",
                "options": {"path": str(folder / "dashboards")},
            }
        ],
    }
    return {
        "prometheus.yml": to_yaml(prometheus, LOCAL),
        RULES: to_yaml(groups(), LOCAL),
        **{f"dashboards/{name}": text for name, text in dashboard_files().items()},
        "grafana/datasources/reknit.yaml": to_yaml(source, LOCAL),
        "grafana/dashboards/reknit.yaml": to_yaml(provider, LOCAL),
    }
