"""What every bench returns, prints and writes. A figure is only ever a measured one."""

from __future__ import annotations

import importlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

NAMES = (
    "recovery",
    "overhead",
    "throughput",
    "fabric",
    "degraded",
    "slow",
    "planning",
    "goodput",
    "changes",
    "serve",
    "feed",
    "engines",
    "schedules",
    "planner",
    "shardings",
    "skipping",
)


Row = Mapping[str, str | float | int | None]


@dataclass(frozen=True)
class BenchReport:
    """``headline`` maps a name to its number; ``goal`` says in words what is aimed at and ``met`` whether
    it was reached; ``rows`` make up the table, or one table after the other where the next rows share no
    key with those before but the first, their name; ``notes`` say what the figures do not show by
    themselves (emulation, missing peers).
    """

    bench: str
    headline: Mapping[str, float | None]
    goal: str
    met: bool
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def machine() -> dict[str, str | int | None]:
    """What the figures were measured on."""
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def run_bench(name: str, path: Path | None, console: Console) -> BenchReport:
    """Runs ``jobs.bench.<name>``, prints its table and writes the JSON to ``path``.

    Raises ValueError for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"{name} is no bench: choose one of {', '.join(NAMES)}")
    run: Callable[[Console], BenchReport] = importlib.import_module(f"jobs.bench.{name}").run
    report = run(console)
    show(report, console)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {**asdict(report), "machine": machine()}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return report


def show(report: BenchReport, console: Console) -> None:
    """The table, the headline, the goal and whether it was met."""
    for rows in _tables(report.rows):
        table = Table(title=report.bench)
        keys = list(dict.fromkeys(key for row in rows for key in row))
        for key in keys:
            table.add_column(key.replace("_", " "), justify="right" if key != keys[0] else "left")
        for row in rows:
            table.add_row(*(_cell(row.get(key)) for key in keys))
        console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    for name, value in report.headline.items():
        console.print(f"{name} = {_cell(value)}", highlight=False)
    console.print(
        f"goal: {report.goal}: {'met' if report.met else 'NOT met'}", highlight=False, soft_wrap=True
    )


def _tables(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each table."""
    name = next(iter(rows[0]))
    tables: list[list[Row]] = []
    for row in rows:
        if tables and any(row.keys() & before.keys() - {name} for before in tables[-1]):
            tables[-1].append(row)
        else:
            tables.append([row])
    return tables


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
