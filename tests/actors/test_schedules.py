"""Every schedule gives the bits of one plain process: undisturbed, with a loss, with a join."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.events import WorkerJoined
from strategies.job import Fault
from strategies.options import Precision
from strategies.schedules.registry import SCHEDULES
from strategies.stage import StageModel
from tests.support.chaos import ChaosRun, Trigger, TriggeringTokens, losses, recoveries
from tests.support.cluster import Result, toy_job
from tests.support.expected import toy_bits
from tests.support.ray_jobs import wait_until

STEPS = 5
IN_ORDER = [name for name in SCHEDULES if name != "skippipe"]
"""Those whose losses and joins are looked at here; paths have ``test_skippipe``."""

LAYOUTS = [(1, 1), (2, 2), (4, 2), (5, 3)]
"""Workers, stages: every schedule is tried in all of them undisturbed. Every schedule meets a loss at every
point, and every layout does, but not every schedule in every layout."""

POINTS = ["forward", "backward", "reduce", "gather"]
"""Of a step, where somebody else dies each time."""


def assert_same_bits(result: Result) -> None:
    assert result.outcome == "completed", result.message
    assert [record.step for record in result.steps] == list(range(1, STEPS + 1))
    assert result.bits == toy_bits(STEPS)
    assert all(record.samples == 10 for record in result.steps)


def run_of(
    folder: Path,
    schedule: str,
    workers: int,
    stages: int,
    *,
    steps: int = STEPS,
    max_workers: int | None = None,
    **changes: Any,
) -> ChaosRun:
    chunks = 2 if SCHEDULES[schedule].chunked else 1
    job = toy_job(folder, schedule=schedule, chunks=chunks, steps=steps, **changes)
    return ChaosRun(job, folder, workers, stages, max_workers=max_workers)


@pytest.mark.parametrize(("workers", "stages"), LAYOUTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_undisturbed(tmp_path: Path, schedule: str, workers: int, stages: int) -> None:
    assert_same_bits(run_of(tmp_path, schedule, workers, stages).run())


LOSSES = [
    (schedule, *LAYOUTS[1 + (row + column) % 3], at)
    for row, schedule in enumerate(IN_ORDER)
    for column, at in enumerate(POINTS)
]
JOINS = [
    (schedule, *layout)
    for row, schedule in enumerate(IN_ORDER)
    for column, layout in enumerate(LAYOUTS)
    if (row + column) % 2 == 0
]


@pytest.mark.parametrize(("schedule", "workers", "stages", "at"), LOSSES)
def test_one_loss(tmp_path: Path, schedule: str, workers: int, stages: int, at: str) -> None:
    micro_batch = 3 if at in ("forward", "backward") else None
    victim = (2 * POINTS.index(at)) % workers
    run = run_of(tmp_path, schedule, workers, stages, faults=(Fault(victim, 3, at, micro_batch),))
    result = run.run()
    assert_same_bits(result)
    died = {event.worker for event in losses(result)}
    assert died == {victim} or micro_batch is not None, "its micro-batch may be another worker's"
    assert len(recoveries(result)) == len(died)
    run.assert_survivors_untouched(died)


@pytest.mark.parametrize(("schedule", "workers", "stages"), JOINS)
def test_one_join(tmp_path: Path, schedule: str, workers: int, stages: int) -> None:
    trigger = Trigger(3, 0)
    data = partial(TriggeringTokens, 5, trigger)
    run = run_of(
        tmp_path, schedule, workers, stages, steps=STEPS + 3, build_data=data, max_workers=workers + 1
    )
    trigger.action = lambda: wait_until(lambda: run.controller.generation >= 2, "a planned change")
    result = run.run()
    assert result.outcome == "completed", result.message
    assert result.bits == toy_bits(STEPS + 3)
    joined = [event for event in result.events if isinstance(event, WorkerJoined)]
    assert [event.worker for event in joined] == [workers]


@pytest.mark.parametrize("recompute", [(), (0, 1, 3)])
def test_recomputed_layers_too(tmp_path: Path, recompute: tuple[int, ...]) -> None:
    precision = Precision(recompute=recompute)
    assert_same_bits(run_of(tmp_path, "zero-bubble", 3, 2, precision=precision).run())


def test_a_loss_while_weight_gradients_are_put_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker dies just as another one turns to those that it has put off."""
    weight_gradients = StageModel.weight_gradients
    struck: list[int] = []
    made = run_of(tmp_path, "zero-bubble", 6, 2)

    def striking(self: StageModel, *rest: Any, **named: Any) -> None:
        first = made.members[0]
        if not struck and self is first.stage and first.follower.version == 2:
            struck.append(1)
            made.kill(1)
            wait_until(lambda: first.endpoint.generation > 1, "the interrupt")
        weight_gradients(self, *rest, **named)

    monkeypatch.setattr(StageModel, "weight_gradients", striking)
    result = made.run()
    assert_same_bits(result)
    assert struck and [event.lost for event in recoveries(result)] == [(1,)]
