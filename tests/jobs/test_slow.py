"""The parts of the slow-worker bench that compute figures, and layers that sleep longer when told to."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from actors.cluster import RayRun
from jobs.bench import slow
from jobs.bench.emulated import build, slow_down
from jobs.bench.slow import Phase, seconds_after, work_of
from runtime.events import StepRecord
from runtime.plan import Plan, Stage


def record(step: int, generation: int, began: float, seconds: float) -> StepRecord:
    return StepRecord(
        step=step,
        loss=1.0,
        grad_norm=1.0,
        learning_rate=0.1,
        samples=1,
        tokens=0,
        seconds=seconds,
        workers=8,
        generation=generation,
        fingerprint=0,
        committed_at=began + seconds,
    )


def test_a_phase_begins_with_the_second_step_after_its_moment() -> None:
    steps = [record(i, 1 + i // 4, 10.0 * i, 1.0 + i) for i in range(8)]
    assert seconds_after(steps, 1, 0.0) == [2.0, 3.0, 4.0]
    assert seconds_after(steps, 1, 15.0) == [4.0]
    assert seconds_after(steps, 2, 15.0) == [6.0, 7.0, 8.0]


PLAN = Plan(1, (Stage(0, 3, (0, 1)), Stage(3, 4, (2,))), ((0, 1, 0, 0), (2, 2, 2, 2)), ())


class Run:
    """A run whose steps are all there."""

    def __init__(self, *generations: int) -> None:
        steps = [record(i, generation, 10.0 * i, 1.0 + i) for i, generation in enumerate(generations)]
        self.progress = lambda *_: SimpleNamespace(outcome=None, steps=steps)


def test_a_phase_goes_on_under_its_own_plan() -> None:
    watch = slow.Watch(cast(RayRun, Run(0, 0, *[1] * (slow.STEPS + 1), 2)))
    phase = watch.phase("even split", 7.5, PLAN, 0.0, 0)
    assert (phase.step_seconds, phase.fastest_seconds, phase.slow_share) == (6.0, 4.0, 9 / 16)


def test_a_phase_that_another_plan_cuts_short_needs_some_steps() -> None:
    enough = [1] * (slow.FEWEST_STEPS + 1)
    assert (
        slow.Watch(cast(RayRun, Run(*enough, 2))).phase("even split", 7.5, PLAN, 0.0, 0).step_seconds == 3.0
    )
    with pytest.raises(RuntimeError, match="after 2 steps"):
        slow.Watch(cast(RayRun, Run(*enough[1:], 2))).phase("even split", 7.5, PLAN, 0.0, 0)


def test_a_phase_waits_for_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.bench.resident.PATIENCE_SECONDS", 0.0)
    with pytest.raises(RuntimeError, match="did not happen"):
        slow.Watch(cast(RayRun, Run(0, 0, 0, 0))).phase("divided anew", 7.5, PLAN, 0.0, 0)


def test_work_is_counted_in_layers_of_micro_batches() -> None:
    assert [work_of(PLAN, worker) for worker in (0, 1, 2, 9)] == [9 / 16, 3 / 16, 4 / 16, 0.0]


def test_the_report_compares_with_the_power_that_is_left() -> None:
    phases = [
        Phase("undisturbed", 8, 4.5, 3.0, "8x2", 0.125),
        Phase("even split", 7.5, 9.6, 6.0, "8x2", 0.125),
        Phase("divided anew", 7.5, 4.8, 3.2, "8x2", 0.07),
    ]
    report = slow.report(phases)
    assert report.headline["share_of_ideal"] == pytest.approx(1.0)
    assert report.headline["even_split_share"] == pytest.approx(0.5)
    assert report.met and report.rows[0]["share_of_ideal"] is None
    assert (
        0.5
        < float(str(report.rows[1]["simulated"]))
        < 0.6
        < slow.GOAL
        < float(str(report.rows[2]["simulated"]))
    )
    loaded = [replace(phase, step_seconds=3 * phase.step_seconds) for phase in phases]
    assert not slow.report(loaded).met


def test_sleeping_layers_follow_the_pace_of_their_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = tmp_path / "pace.json"
    [layer], _ = build(layers=1, forward_seconds=0.25, width=2, pace=str(pace))
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)

    def forward_and_backward() -> None:
        layer(torch.ones(1, 2, requires_grad=True)).sum().backward()

    forward_and_backward()
    slow_down(pace, {os.getpid(): 2.0, 1: 7.0})
    forward_and_backward()
    slow_down(pace, {1: 7.0})
    forward_and_backward()
    # backward takes twice as long as forward: once for the inputs, once for the weights
    assert [sum(slept[:k]) for k in (3, 6, 9)] == [0.75, 2.25, 3.0]


def test_the_recipe_is_valid(tmp_path: Path) -> None:
    recipe = slow.recipe(tmp_path / "pace.json")
    assert recipe.parallel.workers == slow.WORKERS
    assert recipe.model.arguments["pace"] == str(tmp_path / "pace.json")
