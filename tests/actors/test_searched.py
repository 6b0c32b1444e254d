"""Runs whose strategy is searched for at every change have the bits of runs whose strategy is given."""

from __future__ import annotations

from pathlib import Path

import pytest

import actors.planning
from runtime.plan import Plan
from strategies.job import Fault
from strategies.search.space import Space
from tests.support.chaos import recoveries
from tests.support.cluster import LocalRun, run_toy, toy_job
from tests.support.expected import reference_bits
from tests.support.sequences import build_gpt, long_tokens

KILL = (Fault(1, 3, "backward"),)


@pytest.mark.parametrize("schedule", ["gpipe", "zero-bubble", "interleaved"])
def test_each_schedule_by_search_through_a_loss(tmp_path: Path, schedule: str) -> None:
    space = Space(stages=(2,), schedules=(schedule,), recompute=(1,))
    expected = run_toy(tmp_path, 1, 1, name="plain")
    assert run_toy(tmp_path, 3, 2, KILL, search=space).bits == expected.bits


def test_teams_by_search_through_a_loss(tmp_path: Path) -> None:
    # one micro-batch a step: nobody could help but as a member of a team, and links are taken to cost nothing
    space = Space(stages=(1,), schedules=("1f1b",), recompute=(), sequences=(1, 2, 3))
    parts = {"build_model": build_gpt, "build_data": long_tokens, "micro_batches": 1, "steps": 4}
    job = toy_job(
        tmp_path / "run",
        faults=KILL,
        search=space,
        sequence_slices=3,
        link_bytes_per_second=1e15,
        **parts,
    )
    run = LocalRun(job, tmp_path / "run", 3)
    plans: list[Plan] = []
    note = run.recorder.plan
    run.recorder.plan = lambda plan, now: (plans.append(plan), note(plan, now))[1]  # type: ignore[method-assign]
    expected = reference_bits(4, build_model=build_gpt, data=long_tokens(), slices=3, micro_batches=1)
    result = run.run()
    assert result.bits == expected
    assert [event.kept for event in recoveries(result)] == [0.0], "what is of other slices is no use"
    assert plans[0].teams == ((0, 1, 2),) and len(plans[-1].workers) == 2


def test_a_step_without_teams_goes_on_where_teams_were_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors.planning, "pays", lambda *_: True)
    # links are taken to carry next to nothing, so that everybody computes alone
    space = Space(stages=(1,), schedules=("1f1b",), recompute=(), sequences=(1, 2, 3))
    parts = {"build_model": build_gpt, "build_data": long_tokens, "micro_batches": 6, "steps": 4}
    job = toy_job(
        tmp_path / "run",
        faults=(Fault(1, 3, "exchange"),),
        search=space,
        sequence_slices=3,
        link_bytes_per_second=1.0,
        **parts,
    )
    result = LocalRun(job, tmp_path / "run", 3).run()
    expected = reference_bits(4, build_model=build_gpt, data=long_tokens(), slices=3, micro_batches=6)
    assert result.bits == expected
    (recovered,) = recoveries(result)
    assert recovered.kept > 0.0, "what the two that are left have summed"


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
