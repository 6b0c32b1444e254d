"""What every bench returns, prints and writes. A figure is only ever a measured one."""

from __future__ import annotations

import importlib
import json
import os
import platform
from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class BenchReport:
    """``headline`` maps a name to its number; ``goal`` says in words what is aimed at and ``met`` whether
    it was reached; ``rows`` make up the table, all with the same keys; ``notes`` say what the figures
    do not show by themselves (emulation, missing peers).
    """

    bench: str
    headline: Mapping[str, float | None]
    goal: str
    met: bool
    rows: tuple[Mapping[str, str | float | int | None], ...]
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
    table = Table(title=report.bench)
    for key in report.rows[0]:
        table.add_column(
            key.replace("_", " "), justify="right" if key != next(iter(report.rows[0])) else "left"
        )
    for row in report.rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    for name, value in report.headline.items():
        console.print(f"{name} = {_cell(value)}", highlight=False)
    console.print(
        f"goal: {report.goal}: {'met' if report.met else 'NOT met'}", highlight=False, soft_wrap=True
    )


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
