"""The schedules bench's arithmetic and the form of its report. Nothing is timed here."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from jobs.bench.report import show
from jobs.bench.schedules import (
    CASES,
    Bubble,
    formula,
    handling_seconds,
    measured_bubble,
    report,
    simulated,
)
from runtime.plan import Plan, Stage
from runtime.protocol import Measured


def plan_of(chunks: int, micro_batches: int) -> Plan:
    """The bench's: 8 layers on 4 workers."""
    each = 2 // chunks
    stages = tuple(Stage(k * each, (k + 1) * each, (k % 4,)) for k in range(4 * chunks))
    return Plan(0, stages, tuple(stage.workers * micro_batches for stage in stages), ())


@pytest.mark.parametrize(("schedule", "micro_batches", "chunks"), CASES)
def test_the_simulated_bubble_is_the_textbooks(schedule: str, micro_batches: int, chunks: int) -> None:
    timeline = simulated(schedule, plan_of(chunks, micro_batches))
    assert timeline.bubble == pytest.approx(formula(schedule, micro_batches, chunks), abs=1e-9)


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_measured_bubble_is_what_no_layer_takes(chunks: int) -> None:
    plan = plan_of(chunks, 4)
    measured = {}
    for worker in plan.workers:
        layers = [n for k in plan.stages_of(worker) for n in range(plan.stages[k].first, plan.stages[k].stop)]
        seconds = {"pipeline": 40.0 if worker == 0 else 30.0}
        measured[worker] = Measured(
            worker, 3, dict.fromkeys(layers, 1.0), dict.fromkeys(layers, 2.0), seconds
        )
    assert measured_bubble(plan, measured) == 1.0 - (4 * 2 * 4 * 3.0) / (4 * 40.0)


def test_handling_is_what_is_neither_layers_nor_waiting() -> None:
    plan = plan_of(1, 4)
    seconds = {"pipeline": 40.0, "wait_peers": 7.0, "wait_data": 1.0}
    measured = {
        worker: Measured(
            worker, 3, {2 * worker: 1.0, 2 * worker + 1: 1.0}, {2 * worker: 2.0, 2 * worker + 1: 2.0}, seconds
        )
        for worker in plan.workers
    }
    assert handling_seconds(plan, measured, works=2) == (40.0 - 7.0 - 1.0 - 4 * 6.0) / 8
    # what is handled is no layer's: it lengthens the pass, and so the bubble
    alone, handled = (simulated("1f1b", plan, handling) for handling in (0.0, 0.01))
    assert handled.seconds == pytest.approx(alone.seconds + (2 * 4 + 2 * 3) * 0.01)
    assert sum(map(handled.busy, plan.workers)) == pytest.approx(sum(map(alone.busy, plan.workers)))


def test_the_report_names_the_worst_deviation() -> None:
    made = [
        Bubble(schedule, m, chunks, factor * timeline.bubble, timeline, 1.0)
        for (schedule, m, chunks), factor in zip(CASES, (1.0, 1.05, 0.8, 1.0, 1.0), strict=True)
        for timeline in [simulated(schedule, plan_of(chunks, m))]
    ]
    result = report(made)
    assert result.headline["worst_deviation"] == pytest.approx(0.2) and not result.met
    assert report(made[:2]).met
    console = Console(file=StringIO(), width=200)
    show(result, console)
    assert isinstance(console.file, StringIO) and "zero-bubble" in console.file.getvalue()
