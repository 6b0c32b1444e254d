"""Random fault schedules against the real controller and planner, and the replay of one of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console

from jobs.simulate import real_planner
from jobs.terminal import plain_console
from runtime.layout import Layout
from runtime.plan import Member, Plan, WorkerId
from runtime.salvage import Salvage, WorkerProgress
from runtime.signals import PlanChooser, PlanGain, PlanMender
from runtime.simulation.checks import Violation
from runtime.simulation.journal import Journal
from runtime.simulation.schedule import draw, run
from runtime.simulation.settings import Stages
from runtime.simulation.toy import Cut
from runtime.speeds import Speeds
from strategies.planning.mending import mended

SHOWN_EVERY = 500
"""Schedules between two lines of progress."""


def eager_planner(
    layout: Layout, micro_batches: int, stages: Stages, chunks: int = 1, cut: Cut | None = None
) -> tuple[PlanChooser, PlanGain, PlanMender]:
    """The real planner, but that every other interrupted step is salvaged whether that pays or not: on small
    clusters it hardly ever does, and it has to be right all the same."""
    chooser, gain, mender = real_planner(layout, micro_batches, stages, chunks, cut)

    def mend(
        generation: int,
        members: Sequence[Member],
        speeds: Speeds,
        previous: Plan,
        step: int,
        progress: Mapping[WorkerId, WorkerProgress],
    ) -> tuple[Plan, Salvage] | None:
        if step % 2:
            return mended(generation, members, layout, previous, step, progress, [1.0] * layout.layers)
        return mender(generation, members, speeds, previous, step, progress)

    return chooser, gain, mend


def run_schedules(count: int, first: int = 0, console: Console | None = None) -> list[int]:
    """Runs the schedules of the seeds from ``first`` on; returns the seeds of those that failed.

    Each failure is printed with what was violated and how to replay it. Raises ValueError where ``count``
    or ``first`` make no seeds.
    """
    if count < 1 or first < 0:
        raise ValueError(f"{count} schedules from seed {first} on are none: give --schedules 1 or more")
    console = console or plain_console()
    began, failed = time.perf_counter(), []
    seen: Counter[str] = Counter()
    for done, seed in enumerate(range(first, first + count), 1):
        schedule = draw(seed)
        try:
            cluster = run(schedule, eager_planner)
        except Violation as violation:
            failed.append(seed)
            console.print(f"{violation}\n  replay it: reknit simulate --replay {seed}", markup=False)
        else:
            seen.update(fault.kind for fault in schedule.faults)
            seen["steps"] += cluster.record.recorded
            seen["recoveries"] += cluster.checks.resumes
            seen["planned changes"] += cluster.checks.changes
            seen["records taken back"] += cluster.checks.taken_back
            seen["micro-batches salvaged"] += cluster.salvaged_micro_batches
        if done % SHOWN_EVERY == 0 or done == count:
            rate = 60.0 * done / (time.perf_counter() - began)
            console.print(f"{done} schedules, {len(failed)} failed, {rate:.0f} a minute")
    console.print(", ".join(f"{number} {what}" for what, number in sorted(seen.items())))
    return failed


def replay(seed: int, console: Console | None = None) -> bool:
    """Prints the account of the schedule of ``seed``; whether nothing was violated."""
    console = console or plain_console()
    schedule, journal = draw(seed), Journal()
    console.print(str(schedule), markup=False, soft_wrap=True)
    try:
        cluster = run(schedule, eager_planner, journal)
    except Violation as violation:
        outcome, well = str(violation), False
    else:
        outcome, well = f"nothing violated: {cluster.where()}", True
    for line in journal.lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(outcome, markup=False, soft_wrap=True)
    return well
