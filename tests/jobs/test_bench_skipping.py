"""The arithmetic of the bench ``skipping`` and the form of its report. Nothing is timed here."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from jobs.assembly import assemble
from jobs.bench.report import show
from jobs.bench.schedules import PassSeconds
from jobs.bench.skipping import (
    FORWARD_SECONDS,
    LAYERS,
    MICRO_BATCHES,
    STAGES,
    TAKEN,
    Skipped,
    recipe,
    report,
    simulated,
)
from runtime.plan import Member, Plan
from strategies.model import build_model
from strategies.planning.costs import CostModel
from strategies.skippipe.planning import choose_path_plan


def plan_of(taken: int) -> Plan:
    """As the run's planner would make it, were its layers measured exactly."""
    job = assemble(recipe(taken), "nowhere")
    assert job.paths is not None
    layout = build_model(job.build_model, 1).layout
    seconds = (1e-4, *[FORWARD_SECONDS] * (LAYERS - 2), 1e-4)
    costs = CostModel(seconds, tuple(2 * each for each in seconds), (1,) * LAYERS)
    members = [Member(worker, f"{worker}") for worker in range(STAGES)]
    return choose_path_plan(1, members, layout, costs, MICRO_BATCHES, STAGES, None, job.paths)


def test_the_simulated_step_is_shorter_the_more_is_skipped() -> None:
    plans = [plan_of(taken) for taken in TAKEN]
    assert all(len({stage.workers for stage in plan.stages}) == STAGES for plan in plans)
    seconds = [simulated(plan, 0.0) for plan in plans]
    assert seconds[0] > 1.15 * seconds[1] > 1.5 * seconds[2]
    # 1F1B of all: the busiest has three layers, and the pipeline fills and drains
    assert seconds[0] == pytest.approx(3 * FORWARD_SECONDS * (3 * MICRO_BATCHES + 2 + 3 + 3))


def test_the_report_compares_ratios() -> None:
    def made(taken: int, measured: float, simulated: float) -> Skipped:
        return Skipped(taken, PassSeconds(plan_of(taken), 0.1, measured, 0.001), simulated)

    result = report([made(4, 2.0, 1.0), made(3, 1.6, 0.75), made(2, 1.05, 0.5)])
    assert result.headline["worst_deviation"] == pytest.approx(0.8 / 0.75 - 1.0) and result.met
    assert not report([made(4, 2.0, 1.0), made(3, 1.6, 0.6)]).met
    console = Console(file=StringIO(), width=200)
    show(result, console)
    assert isinstance(console.file, StringIO) and "3 of 4" in console.file.getvalue()
