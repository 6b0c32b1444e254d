"""What a dashboard is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WINDOW = "$__rate_interval"
"""Grafana's own variable: long enough for a rate at the data source's scrape interval."""

Kind = Literal["timeseries", "stat", "bargauge"]


@dataclass(frozen=True, slots=True)
class Series:
    """A PromQL expression, and what its lines are called: ``{{label}}`` stands for a label's value."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """``unit`` is one of Grafana's; ``stacked`` series add up to something; ``width`` is in 24ths of a row.
    ``low`` and ``high`` bound the axis."""

    title: str
    description: str
    unit: str
    series: tuple[Series, ...]
    kind: Kind = "timeseries"
    stacked: bool = False
    width: int = 8
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a heading, from left to right; what does not fit goes to the next line."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """Vertical lines over all charts, where ``expr`` has a value."""

    name: str
    expr: str
    text: str


@dataclass(frozen=True, slots=True)
class Dashboard:
    """``known_by`` is a metric that every run has: its label ``run`` fills the menu of runs."""

    uid: str
    title: str
    description: str
    known_by: str
    rows: tuple[Row, ...]
    marks: tuple[Mark, ...] = ()

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)


def per(labels: str, how: str, metric: str, *conditions: str) -> str:
    """``metric`` of the chosen runs, put together over all labels but ``labels``: where it was scraped says
    nothing of the run, and changes when a controller moves."""
    selector = ", ".join(['run=~"$run"', *conditions])
    return f"{how} by ({labels}) ({metric}{{{selector}}})"


def rate(labels: str, metric: str, *conditions: str, how: str = "sum") -> str:
    """As ``per``, of a counter's growth per second."""
    selector = ", ".join(['run=~"$run"', *conditions])
    return f"{how} by ({labels}) (rate({metric}{{{selector}}}[{WINDOW}]))"
