"""A dashboard in Grafana's JSON model (of schema 39, Grafana 10.4 and newer)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from jobs.dashboards.panel import Dashboard, Panel

COLUMNS = 24
HEIGHT = {"stat": 5, "bargauge": 5, "timeseries": 8}
"""Of a panel, in Grafana's rows of 30 pixels."""

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def to_json(dashboard: Dashboard) -> str:
    """The dashboard as a file that Grafana provisions or imports."""
    model = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["reknit"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # one cursor over all charts
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_annotation(mark.name, mark.expr, mark.text) for mark in dashboard.marks]},
        "templating": {"list": _variables(dashboard.known_by)},
        "links": [
            {
                "type": "dashboards",
                "title": "Reknit",
                "tags": ["reknit"],
                "asDropdown": False,
                "keepTime": True,
                "includeVars": False,
            }
        ],
        "panels": list(_panels(dashboard)),
    }
    return json.dumps(model, indent=1) + "\n"


def _variables(known_by: str) -> list[dict[str, Any]]:
    query = f"label_values({known_by}, run)"
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "run",
            "label": "Run",
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": query, "refId": "run"},
            "definition": query,
            "refresh": 2,
            "sort": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _annotation(name: str, expr: str, text: str) -> dict[str, Any]:
    return {
        "name": name,
        "datasource": _SOURCE,
        "enable": True,
        "expr": expr,
        "titleFormat": text,
        "iconColor": "orange",
        "step": "10s",
    }


def _panels(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    identity = y = 0
    for row in dashboard.rows:
        identity += 1
        yield {
            "id": identity,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
            "panels": [],
        }
        y += 1
        x = tallest = 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            identity += 1
            height = HEIGHT[panel.kind]
            yield {
                "id": identity,
                "gridPos": {"x": x, "y": y, "w": panel.width, "h": height},
                **_panel(panel),
            }
            x, tallest = x + panel.width, max(tallest, height)
        y += tallest


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.low is not None:
        defaults["min"] = panel.low
    if panel.high is not None:
        defaults["max"] = panel.high
    options: dict[str, Any]
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 60 if panel.stacked else 0,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    else:
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "values": False}, "orientation": "auto"}
        options |= (
            {"textMode": "value_and_name", "colorMode": "none", "graphMode": "area"}
            if panel.kind == "stat"
            else {"displayMode": "basic", "valueMode": "color"}
        )
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _SOURCE,
                "editorMode": "code",
                "expr": series.expr,
                "legendFormat": series.legend,
                "range": True,
            }
            for number, series in enumerate(panel.series)
        ],
    }
