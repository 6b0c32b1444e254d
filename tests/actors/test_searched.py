"""Runs whose strategy is searched for at every change have the bits of runs whose strategy is given."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import actors.planning
import strategies.search.planning
from runtime.plan import Plan
from strategies.job import Fault
from strategies.search.planning import searched_plan
from strategies.search.space import Space
from strategies.shardings.registry import SHARDINGS
from tests.support.chaos import ChaosRun, Trigger, TriggeringTokens, random_faults, recoveries
from tests.support.cluster import LocalRun, run_toy, toy_job
from tests.support.expected import reference_bits, toy_bits
from tests.support.ray_jobs import wait_until
from tests.support.sequences import build_gpt, long_tokens

KILL = (Fault(1, 3, "backward"),)


def plans_of(run: LocalRun) -> list[Plan]:
    """Gets every plan that ``run`` follows."""
    plans: list[Plan] = []
    note = run.recorder.plan
    run.recorder.plan = lambda plan, now: (plans.append(plan), note(plan, now))[1]  # type: ignore[method-assign]
    return plans


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
    plans = plans_of(run)
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
    plans = plans_of(run)
    assert run.run().bits == expected.bits
    # what the two that are left have to keep without recomputing is more, however the layers are cut
    strategy = plans[-1].strategy
    assert len(plans[-1].workers) == 2 and strategy is not None and strategy.recompute


SHARDED = Space(stages=(1, 2), schedules=("1f1b",), recompute=())


def test_the_sharding_changes_as_memory_gets_scarce_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategies.search.planning, "KEPT", 0.0)  # here ZeRO-1 is only a little faster
    trigger = Trigger(5, 0)
    space = replace(SHARDED, stages=(1,), shardings=("zero1", "zero3"))
    data = partial(TriggeringTokens, 5, trigger)
    # enough for four workers' ZeRO-1 (344,520 bytes) and not for three's (397,000)
    parts = {"build_data": data, "search": space, "worker_memory_bytes": 345_000}
    run = ChaosRun(toy_job(tmp_path, steps=8, faults=KILL, **parts), tmp_path, 4, max_workers=4)
    plans = plans_of(run)
    hire = run.hire

    def hire_later(worker: int) -> None:
        """Who comes for the lost one must not be there before the others have a plan of their own."""
        wait_until(lambda: len(plans) > 1, "a plan without the lost worker")
        hire(worker)

    def hiring(worker: int) -> None:
        threading.Thread(target=hire_later, args=(worker,), daemon=True).start()

    run.hire = hiring  # type: ignore[method-assign]

    def replaced() -> None:
        wait_until(lambda: run.controller.generation >= 3, "a worker in place of the lost")

    trigger.action = replaced
    result = run.run()
    assert result.bits == toy_bits(8)
    found = [(len(plan.workers), plan.strategy.sharding) for plan in plans if plan.strategy is not None]
    assert found == [(4, "zero1"), (3, "zero3"), (4, "zero1")]
    assert [recovery.kept for recovery in recoveries(result)] == [0.0], "the step is not finished as it began"


@pytest.fixture
def another_sharding_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(generation: int, *rest: Any) -> Plan:
        *parts, space, previous = rest
        name = list(SHARDINGS)[generation % len(SHARDINGS)]
        return searched_plan(generation, *parts, replace(space, shardings=(name,)), previous)

    monkeypatch.setattr(actors.planning, "searched_plan", searched)


@pytest.mark.usefixtures("another_sharding_every_time")
@pytest.mark.parametrize("seed", range(8))
def test_any_sharding_goes_on_with_what_any_other_holds(tmp_path: Path, seed: int) -> None:
    """Up to all but one of four are lost at random points, also in the recovery from one another."""
    rng = random.Random(seed)
    victims = rng.sample(range(4), rng.randint(1, 3))
    faults = random_faults(rng, 4, victims, 6)
    job = toy_job(tmp_path, steps=6, faults=faults, search=SHARDED, checkpoint_every=2, salvage=False)
    run = ChaosRun(job, tmp_path, 4, 2, max_workers=4 if seed % 2 else None)
    plans = plans_of(run)
    result = run.run()
    assert result.bits == toy_bits(6)
    if recoveries(result):
        assert len({plan.strategy.sharding for plan in plans if plan.strategy is not None}) > 1
