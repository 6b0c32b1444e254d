"""``reknit simulate``: the real controller and planner on a cluster that does not exist.

Which machines go and come back when is told by a trace (see ``runtime.simulation.trace`` for its format).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from actors.planning import plan_chooser, plan_gain, plan_mender
from jobs.terminal import plain_console
from runtime.layout import Layout
from runtime.plan import Strategy
from runtime.signals import PlanChooser, PlanGain, PlanMender, Terms
from runtime.simulation.fleet import Fleet
from runtime.simulation.fleet_report import FleetReport, FleetSettings
from runtime.simulation.settings import Stages
from runtime.simulation.toy import Cut, toy_layout
from runtime.simulation.trace import Entry, read_trace, spot_trace
from strategies.profile import Profile
from strategies.schedules.registry import DEFAULT
from strategies.skippipe.paths import Paths

SAMPLE_TRACE = Path(__file__).parent / "traces" / "spot.csv"

LAYERS = 32
UNITS_PER_LAYER = 1 << 20
"""A model of 32 equal layers of 67 million parameters each."""

LAYER_SECONDS = 0.01
"""Forward, per layer and micro-batch."""

AFTER_THE_TRACE = 60.0
"""Seconds that the simulation goes on for after the trace's last row."""


def simulate(
    workers: int,
    trace: Path | None = None,
    seed: int | None = None,
    *,
    workers_per_node: int = 8,
    min_workers: int = 1,
    stages: Stages = "auto",
    micro_batches: int | None = None,
    console: Console | None = None,
) -> FleetReport:
    """Plays a trace to ``workers`` simulated workers and prints what came of it.

    Without ``trace`` the sample is played, or one that is drawn from ``seed``. ``micro_batches`` is two per
    worker unless it is given. Raises ValueError for numbers that make no cluster and for a broken trace.
    """
    if workers < 1 or workers_per_node < 1:
        raise ValueError(
            f"{workers} workers, {workers_per_node} on a node, make no cluster: give 1 or more each"
        )
    if not 1 <= min_workers <= workers:
        raise ValueError(f"min_workers must lie between 1 and {workers}, the number of workers")
    if trace is not None and seed is not None:
        raise ValueError("give a trace or a seed to draw one from, not both")
    entries = spot_trace(1200.0, 60.0, seed) if seed is not None else read_trace(trace or SAMPLE_TRACE)
    batches = micro_batches or 2 * workers
    layout = toy_layout(LAYERS, UNITS_PER_LAYER)
    terms = Terms(
        run="simulated",
        layout=layout,
        steps=1 << 40,
        workers=workers,
        min_workers=min_workers,
        max_workers=workers,
    )
    settings = FleetSettings(terms, batches, workers_per_node=workers_per_node, layer_seconds=LAYER_SECONDS)
    chooser, *_ = real_planner(layout, batches, stages)
    report = Fleet(settings, chooser, entries).play(_seconds(entries))
    (console or plain_console()).print(_table(settings, report), soft_wrap=True)
    return report


def real_planner(
    layout: Layout, micro_batches: int, stages: Stages, chunks: int = 1, cut: Cut | None = None
) -> tuple[PlanChooser, PlanGain, PlanMender]:
    """The planner as a run has it; what passes between layers takes no time."""
    profile = Profile(forward=(), backward=(), boundary_bytes=())
    paths = None if cut is None else Paths(cut.bounds, cut.paths)
    strategy = Strategy("interleaved" if chunks > 1 else DEFAULT, chunks)
    chooser = plan_chooser(layout, profile, micro_batches, stages, strategy, paths=paths)
    gain = plan_gain(layout, profile, strategy, paths=paths)
    return chooser, gain, plan_mender(layout, profile, lambda plan: True)


def _seconds(entries: Sequence[Entry]) -> float:
    return max((entry.time for entry in entries), default=0.0) + AFTER_THE_TRACE


def _table(settings: FleetSettings, report: FleetReport) -> Table:
    workers = settings.terms.workers
    table = Table(
        title=f"{workers} simulated workers, {settings.workers_per_node} on a node", show_header=False
    )
    rows = [
        ("simulated time", f"{report.seconds:.0f} s"),
        ("committed steps", f"{report.steps}"),
        ("goodput (share of the time in steps that count)", f"{report.goodput:.1%}"),
        ("nodes lost", f"{report.lost_nodes} ({report.lost_workers} workers)"),
        ("recoveries", _of(len(report.recovery_seconds), report.recovery_seconds, 1.0, "s, simulated")),
        ("of these, back to a checkpoint", f"{report.from_checkpoint}"),
        ("steps done again", f"{report.repeated_steps} ({report.taken_back} of them on record)"),
        ("planned changes (joins, notices)", f"{report.changes}"),
        ("workers that joined, that left on notice", f"{report.joined}, {report.released}"),
        ("fewest workers", f"{report.least_workers}"),
        ("planning alone, measured on this machine", _of(len(report.planning), report.planning, 1e3, "ms")),
        (
            "whole decisions (agreeing, planning, resharding), measured here",
            _of(len(report.deciding), report.deciding, 1e3, "ms"),
        ),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _of(count: int, values: Sequence[float], scale: float, unit: str) -> str:
    if not values:
        return "none"
    middle, worst = median(values) * scale, max(values) * scale
    return f"{count}: median {middle:.3g}, worst {worst:.3g} {unit}"
