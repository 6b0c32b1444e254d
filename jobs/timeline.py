"""A schedule's simulated pass as a table, as a picture in the terminal and as files for other viewers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runtime.plan import Plan
from strategies.schedules.even import even_path_plan, even_plan
from strategies.schedules.instructions import Work
from strategies.schedules.registry import SCHEDULES, schedule_named, skipping_schedules
from strategies.schedules.simulation import Span, StageSeconds, Timeline, simulate
from strategies.skippipe.paths import stage_share, swaps_allowed
from strategies.skippipe.search import search_paths, swaps_of

LETTERS = {Work.FORWARD: "F", Work.BACKWARD: "B", Work.INPUT_GRADIENT: "I", Work.WEIGHT_GRADIENT: "W"}
COLOURS = {
    Work.FORWARD: "#4c78a8",
    Work.BACKWARD: "#54a24b",
    Work.INPUT_GRADIENT: "#72b7b2",
    Work.WEIGHT_GRADIENT: "#e4a13a",
}
IDLE = "."
NARROWEST, WIDEST = 40, 160
"""Columns of the terminal's picture."""

ROW, WIDTH, MARGIN = 26, 1200, 80
"""Pixels of the SVG: a worker's height, the time axis, and the workers' names before it."""


def show_schedule(
    name: str,
    stages: int,
    micro_batches: int,
    chunks: int,
    seconds: StageSeconds,
    console: Console,
    *,
    svg: Path | None = None,
    spans: Path | None = None,
    room: int | None = None,
    taken: int | None = None,
    swaps: int | None = None,
) -> Timeline:
    """Simulates one step of ``stages`` workers, one each, prints what it costs and draws it.

    With ``taken`` every micro-batch passes so many stages, ``swaps`` of them late
    (``strategies.skippipe.paths``); stage 0, which all pass, is as much shorter that all workers have as much
    to do. The step of all stages is printed beside it.

    ``seconds`` are one micro-batch's at one worker, over all its ``chunks``; ``svg`` and ``spans`` (JSON) are
    written too. Raises ValueError for an unknown name, counts that the schedule cannot do, a deadlock, and
    where a worker keeps activations of more than ``room`` micro-batches.
    """
    schedule = schedule_named(name, chunks)
    plan = even_plan(stages, micro_batches, chunks)
    each = [seconds.times(1 / chunks)] * len(plan.stages)
    title = f"{name}: {stages} stages x {micro_batches} micro-batches"
    title += f", {chunks} chunks each" if chunks > 1 else ""
    whole = None
    if taken is not None:
        if not SCHEDULES[name].skips:
            raise ValueError(
                f"the schedule {name} passes every stage in order: choose {skipping_schedules()}, "
                "or no --taken"
            )
        whole = simulate(schedule, plan, each).seconds
        paths = search_paths(stages, taken, micro_batches, swaps_allowed(stages, taken, swaps))
        plan, each = even_path_plan(stages, paths), _shared(stages, taken, seconds)
        title += f", {taken} taken"
    timeline = simulate(schedule, plan, each, room=None if room is None else room * chunks)
    console.print(_table(title, timeline, chunks))
    console.print(
        f"step {timeline.seconds:.4g} s, bubble {timeline.bubble:.1%}, peak activations "
        f"{max(timeline.peaks.values()) / chunks:.4g} micro-batches of a worker's layers",
        highlight=False,
    )
    if whole is not None:
        late = sum(map(swaps_of, plan.paths))
        console.print(
            f"all stages take {whole:.4g} s: {timeline.seconds / whole:.1%} of that; {late} stages are late",
            highlight=False,
        )
    for line in picture(timeline, min(max(console.width - 6, NARROWEST), WIDEST)):
        console.print(line, overflow="crop", no_wrap=True)
    if svg is not None:
        svg.write_text(as_svg(title, timeline), encoding="utf-8")
    if spans is not None:
        spans.write_text(json.dumps(as_json(timeline, plan), indent=1) + "\n", encoding="utf-8")
    return timeline


def _shared(stages: int, taken: int, seconds: StageSeconds) -> list[StageSeconds]:
    """The stages' of a model that takes ``seconds`` times ``stages``, and of its end, that takes none."""
    first = stage_share(stages, taken)
    usual = stages / (stages - 1 + first)
    return [seconds.times(first * usual), *[seconds.times(usual)] * (stages - 1), seconds.times(0.0)]


def _table(title: str, timeline: Timeline, chunks: int) -> Table:
    table = Table(title=title)
    for column in ("worker", "busy s", "idle", "peak activations"):
        table.add_column(column, justify="right")
    for worker, peak in timeline.peaks.items():
        busy = timeline.busy(worker)
        table.add_row(
            str(worker), f"{busy:.4g}", f"{1 - busy / timeline.seconds:.1%}", f"{peak / chunks:.4g}"
        )
    return table


def picture(timeline: Timeline, width: int) -> list[Text]:
    """A line for each worker and one that explains; a column is ``seconds`` / ``width``. Forward, backward,
    its parts for the input and the weights have a letter, followed by the micro-batch's number where there
    is room."""
    lines = []
    for worker in timeline.peaks:
        line = Text(f"{worker:>4} ")
        at = 0
        for span in _spans_of(timeline, worker):
            begin, end = (round(edge / timeline.seconds * width) for edge in (span.begin, span.end))
            line.append(IDLE * (begin - at), style="dim")
            cell = f"{LETTERS[span.work]}{span.micro_batch}"
            line.append(cell[: end - begin].ljust(end - begin), style=f"black on {COLOURS[span.work]}")
            at = end
        line.append(IDLE * (width - at), style="dim")
        lines.append(line)
    used = {span.work for span in timeline.spans}
    legend = ", ".join(f"{LETTERS[work]} {work.value}" for work in Work if work in used)
    return [*lines, Text(f"     {legend}, {IDLE} idle", style="dim")]


def as_svg(title: str, timeline: Timeline) -> str:
    """A drawing of its own, with what every bar is as its tooltip."""
    workers = list(timeline.peaks)
    scale = WIDTH / timeline.seconds
    bars = []
    for row, worker in enumerate(workers):
        y = (row + 1) * ROW
        bars.append(f'<text x="4" y="{y + 17}">worker {worker}</text>')
        for span in _spans_of(timeline, worker):
            x, wide = MARGIN + span.begin * scale, (span.end - span.begin) * scale
            tip = f"{span.work.value} of micro-batch {span.micro_batch} at stage {span.stage}, "
            tip += f"{span.begin:.4g} to {span.end:.4g} s"
            bars.append(
                f'<g><title>{escape(tip)}</title><rect x="{x:.2f}" y="{y}" width="{wide:.2f}" '
                f'height="{ROW - 4}" fill="{COLOURS[span.work]}" stroke="white"/>'
                + (f'<text x="{x + 3:.2f}" y="{y + 16}">{span.micro_batch}</text>' if wide > 14 else "")
                + "</g>"
            )
    height = (len(workers) + 2) * ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {MARGIN + WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12"><text x="4" y="16">{escape(title)}, bubble '
        f"{timeline.bubble:.1%}</text>{''.join(bars)}</svg>\n"
    )


def as_json(timeline: Timeline, plan: Plan) -> dict[str, object]:
    """``spans`` in order of their beginning, and what the table says."""
    return {
        "seconds": timeline.seconds,
        "bubble": timeline.bubble,
        "micro_batches": plan.micro_batches,
        "peaks": {str(worker): peak for worker, peak in timeline.peaks.items()},
        "spans": [
            {
                "worker": span.worker,
                "stage": span.stage,
                "micro_batch": span.micro_batch,
                "work": span.work.value,
                "begin": span.begin,
                "end": span.end,
            }
            for span in sorted(timeline.spans, key=lambda span: (span.begin, span.worker))
        ],
    }


def _spans_of(timeline: Timeline, worker: int) -> Sequence[Span]:
    return sorted((s for s in timeline.spans if s.worker == worker), key=lambda span: span.begin)
