"""Runs whose strategy is searched for at every change have the bits of runs whose strategy is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.plan import Plan
from strategies.job import Fault
from strategies.search.space import Space
from tests.support.cluster import LocalRun, run_toy, toy_job

KILL = (Fault(1, 3, "backward"),)


@pytest.mark.parametrize("schedule", ["gpipe", "zero-bubble", "interleaved"])
def test_each_schedule_by_search_through_a_loss(tmp_path: Path, schedule: str) -> None:
    space = Space(stages=(2,), schedules=(schedule,), recompute=(1,))
    expected = run_toy(tmp_path, 1, 1, name="plain")
    assert run_toy(tmp_path, 3, 2, KILL, search=space).bits == expected.bits


def test_recomputing_for_lack_of_memory_changes_no_bit(tmp_path: Path) -> None:
    expected = run_toy(tmp_path, 1, 1, name="plain")
    job = toy_job(tmp_path / "run", faults=KILL, search=Space(stages=(2,)), worker_memory_bytes=522_000)
    run = LocalRun(job, tmp_path / "run", 3)
    plans: list[Plan] = []
    note = run.recorder.plan
    run.recorder.plan = lambda plan, now: (plans.append(plan), note(plan, now))[1]  # type: ignore[method-assign]
    assert run.run().bits == expected.bits
    # what the two that are left have to keep without recomputing is more, however the layers are cut
    strategy = plans[-1].strategy
    assert len(plans[-1].workers) == 2 and strategy is not None and strategy.recompute
