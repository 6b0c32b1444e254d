"""``reknit top``: a run in a terminal, live or finished."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.watch.record import RunRecord
from jobs.watch.source import source_of
from jobs.watch.view import charts, current_plan, events, newest_whole, shares, summary

LOOK_SECONDS = 1.0
TRIES = 10
"""Looks in a row that may fail, for a disk or a cluster that is away for a moment."""

EVENTS = 6
BAR = 28
"""Characters of a worker's bar, and of the sparkline."""

ROWS = 40
"""Workers that are shown; of more, the busiest and the idlest of each stage."""

STYLES = {
    "forward": "blue",
    "backward": "green",
    "held_out": "cyan",
    "data": "yellow",
    "reduce": "dark_orange3",
    "exchange": "magenta",
    "optimizer": "purple",
    "gather": "orange3",
    "backup": "dark_cyan",
    "recovery": "red",
    "wait": "bright_black",
    "idle": "bright_black",
}
"""In the order of a bar's parts. Waiting and idling are drawn as gaps."""

COMPUTING = ("forward", "backward", "held_out", "data", "optimizer")

_BLOCKS = "▁▂▃▄▅▆▇█"


def top(run: str | Path, *, once: bool, console: Console) -> None:
    """Shows the run until it has ended or Ctrl-C; ``once`` prints what there is and returns.

    Raises ValueError if there is no such run, OSError if it cannot be read any more.
    """
    with source_of(run) as source:
        record = RunRecord(source)
        record.follow()
        if once or not console.is_terminal:
            console.print(screen(record, time.time()))
            return
        with Live(screen(record, time.time()), console=console, auto_refresh=False) as live:
            failed = 0
            while not summary(record, time.time())["over"]:
                time.sleep(LOOK_SECONDS)
                try:
                    record.follow()
                    failed = 0
                except OSError:
                    failed += 1
                    if failed > TRIES:
                        raise
                live.update(screen(record, time.time()), refresh=True)


def screen(record: RunRecord, now: float) -> RenderableType:
    """Everything, from top to bottom."""
    figures = summary(record, now)
    parts: list[RenderableType] = [_headline(figures), _curves(record, figures), Text()]
    plan = current_plan(record)
    if plan is not None:
        strategy = plan.get("strategy")  # where it was searched for
        parts += [Text(f"strategy: {strategy}", style="dim")] if strategy else []
        parts += [_workers(record, plan), _legend()]
    happened = [each for each in events(record) if each["tone"] != "quiet"][-EVENTS:]
    if happened:
        parts += [Text(), _events(happened)]
    if figures["unreadable"]:
        parts.append(Text(f"{figures['unreadable']} lines of the record could not be read", style="yellow"))
    return Group(*parts)


def _headline(figures: Mapping[str, Any]) -> Text:
    state = figures["state"]
    style = {"running": "green", "completed": "green", "failed": "red", "recovering": "red"}.get(
        state, "yellow"
    )
    line = Text.assemble((figures["name"], "bold"), "  ", (state, style))
    steps = f" of {figures['steps']:,}" if figures["steps"] is not None else ""
    line.append(f"  step {figures['step']:,}{steps}")
    if figures["workers"]:
        line.append(f"  {figures['workers']} workers")
        line.append(f" in {figures['stages']} stages" if figures["stages"] else "")
        line.append(f"  generation {figures['generation']}")
    if figures["goodput"] is not None:
        line.append(f"  goodput {figures['goodput']:.1%}")
    if figures["detail"]:
        line.append(f"\n{figures['detail']}", style=style)
    return line


def _curves(record: RunRecord, figures: Mapping[str, Any]) -> Text:
    curves = charts(record)
    loss, speed = figures["loss"], figures["tokens_per_second"]
    return Text.assemble(
        ("loss ", "dim"),
        (sparkline(curves["loss"]["y"]), "blue"),
        f" {loss:.4f}" if loss is not None else " -",
        ("   tokens/s ", "dim"),
        (sparkline(curves["throughput"]["y"]), "green"),
        f" {speed:,.0f}" if speed is not None else " -",
    )


def sparkline(values: Sequence[float | None], width: int = BAR) -> str:
    """The values as ``width`` blocks at most, each the mean of equally many; the least is the lowest."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    columns = min(width, len(known))
    bounds = [round(column * len(known) / columns) for column in range(columns + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[3] * columns
    return "".join(_BLOCKS[round((mean - low) / (high - low) * (len(_BLOCKS) - 1))] for mean in means)


def _workers(record: RunRecord, plan: Mapping[str, Any]) -> Table:
    newest = newest_whole(record)
    mixes = shares(newest) if newest else {}
    title = f"the last step's time, step {newest['step']}" if newest else "no step's times are on record"
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("stage", "layers", "worker", "micro-batches"):
        table.add_column(name, justify="right")
    table.add_column(title, no_wrap=True)
    table.add_column("computing", justify="right")
    total = sum(len(stage["workers"]) for stage in plan["stages"])
    room = max(2, ROWS // max(1, len(plan["stages"]))) if total > ROWS else total
    leads = {worker: team[0] for team in plan.get("teams", ()) for worker in team}
    for number, stage in enumerate(plan["stages"]):
        workers = stage["workers"]
        shown = _extremes(workers, mixes, room)
        row = plan["assignment"][number]
        for index, worker in enumerate(shown):
            batches = sum(each == leads.get(worker, worker) for each in row)
            mix = mixes.get(worker)
            table.add_row(
                str(number) if index == 0 else "",
                f"{stage['first']}-{stage['stop'] - 1}" if index == 0 else "",
                str(worker),
                str(batches),
                bar(mix) if mix else Text("-", style="dim"),
                f"{busy(mix):.0%}" if mix else "",
            )
        if len(shown) < len(workers):
            table.add_row("", "", "", "", Text(f"and {len(workers) - len(shown)} between", style="dim"), "")
    return table


def _extremes(workers: Sequence[int], mixes: Mapping[int, Mapping[str, float]], room: int) -> list[int]:
    if len(workers) <= room:
        return list(workers)
    ordered = sorted(workers, key=lambda worker: (-busy(mixes.get(worker, {})), worker))
    return [*ordered[: (room + 1) // 2], *ordered[-(room // 2) :]]


def busy(mix: Mapping[str, float]) -> float:
    """The share of a step that a worker computed. What it says to others includes waiting for them."""
    return sum(mix.get(kind, 0.0) for kind in COMPUTING)


def bar(mix: Mapping[str, float], width: int = BAR) -> Text:
    """The shares of a step, side by side; rounded so that together they are as long as they should be."""
    line, whole, drawn = Text(), 0.0, 0
    for kind, style in STYLES.items():
        whole += mix.get(kind, 0.0)
        end = min(width, round(whole * width))
        line.append(("·" if kind in ("wait", "idle") else "█") * max(0, end - drawn), style=style)
        drawn = max(drawn, end)
    return line


def _legend() -> Text:
    line = Text()
    for kind, style in STYLES.items():
        if kind not in ("wait", "idle"):
            line.append("█", style=style).append(f" {kind.replace('_', '-')}  ", style="dim")
    return line.append("·", style="bright_black").append(" waits", style="dim")


def _events(happened: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="dim", no_wrap=True, justify="right")
    table.add_column(overflow="fold")
    for each in happened:
        style = {"bad": "red", "good": "green"}.get(each["tone"], "")
        at = f"{datetime.fromtimestamp(each['time']):%H:%M:%S}"
        step = "" if each["step"] is None else f"step {each['step']}"
        table.add_row(at, step, Text(each["text"], style=style))
    return table
