"""Workers come, are told to go, hang and are replaced: the bits of a run in which nothing happened."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.detection import Patience
from runtime.events import (
    ControllerRestarted,
    DrainNotice,
    Paused,
    Recovered,
    Resumed,
    WorkerJoined,
    WorkerLeft,
)
from runtime.signals import Drain
from strategies.job import Fault
from tests.support.chaos import ChaosRun, Trigger, TriggeringTokens, losses, recoveries
from tests.support.cluster import Result, toy_job
from tests.support.expected import toy_bits
from tests.support.ray_jobs import wait_until

STEPS = 8


def events_of(result: Result, kind: type[Any]) -> list[Any]:
    return [event for event in result.events if isinstance(event, kind)]


def assert_same_bits(result: Result, steps: int = STEPS) -> None:
    assert result.outcome == "completed", result.message
    assert [record.step for record in result.steps] == list(range(1, steps + 1))
    assert result.bits == toy_bits(steps)
    assert all(record.samples == 10 for record in result.steps)


def run_with(
    folder: Path,
    action: Callable[[ChaosRun], None] | None = None,
    *,
    workers: int,
    stages: int = 2,
    at: tuple[int, int] = (3, 0),
    faults: tuple[Fault, ...] = (),
    steps: int = STEPS,
    **changes: Any,
) -> tuple[ChaosRun, Result]:
    """``action`` is called while micro-batch ``at[1]`` of step ``at[0]`` is read; the step waits for it."""
    trigger = Trigger(*at)
    data = partial(TriggeringTokens, 5, trigger)
    run = ChaosRun(
        toy_job(folder, build_data=data, faults=faults, steps=steps), folder, workers, stages, **changes
    )
    if action is not None:
        trigger.action = partial(action, run)
    return run, run.run()


def until_a_change_is_ordered(run: ChaosRun, generation: int = 2) -> None:
    """The first plan is generation 1, and every loss and every change makes a new one."""
    wait_until(lambda: run.controller.generation >= generation, "a planned change")


@pytest.mark.parametrize(("workers", "stages", "most"), [(1, 1, 2), (2, 2, 3), (3, 2, 4), (3, 1, 5)])
def test_newcomers_enter_at_a_step_boundary(tmp_path: Path, workers: int, stages: int, most: int) -> None:
    _, result = run_with(
        tmp_path, until_a_change_is_ordered, workers=workers, stages=stages, max_workers=most
    )
    assert_same_bits(result)
    assert not recoveries(result), "nobody is interrupted for a newcomer"
    joined = events_of(result, WorkerJoined)
    assert sorted(event.worker for event in joined) == list(range(workers, most))
    assert [event.workers_after for event in joined] == list(range(workers + 1, most + 1))
    assert result.steps[-1].workers == most


def until_three_is_planned_for(run: ChaosRun) -> None:
    """Worker 3 may have been quick enough for the recovery's own plan; if not, it joins in generation 3."""
    controller = run.controller
    wait_until(
        lambda: controller.generation >= 3 or (controller.plan is not None and 3 in controller.plan.workers),
        "a plan with the newcomer",
    )


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_lost_worker_is_replaced(tmp_path: Path, victim: int) -> None:
    run, result = run_with(
        tmp_path,
        until_three_is_planned_for,
        workers=3,
        at=(5, 0),
        faults=(Fault(victim, 3, "backward"),),
        max_workers=3,
    )
    assert_same_bits(result)
    (recovered,) = recoveries(result)
    assert recovered.lost == (victim,)
    joined = [event.worker for event in events_of(result, WorkerJoined)]
    assert (recovered.workers_after, joined) in [(2, [3]), (3, [])]
    assert result.steps[-1].workers == 3
    run.assert_survivors_untouched({victim})


def test_a_spare_takes_over_at_once(tmp_path: Path) -> None:
    """It is warmed up, so the recovery itself puts it to work."""

    def lose_one(run: ChaosRun) -> None:
        wait_until(lambda: 3 in run.controller.members, "the spare")
        run.kill(1)

    _, result = run_with(tmp_path, lose_one, workers=3, max_workers=3, spares=1)
    assert_same_bits(result)
    (recovered,) = recoveries(result)
    assert (recovered.workers_before, recovered.workers_after) == (3, 3)
    assert result.steps[-1].workers == 3


def test_the_loss_of_a_spare_interrupts_nobody(tmp_path: Path) -> None:
    def lose_the_spare(run: ChaosRun) -> None:
        wait_until(lambda: 2 in run.controller.members, "the spare")
        run.kill(2)
        wait_until(lambda: 3 in run.controller.members, "another spare")

    _, result = run_with(tmp_path, lose_the_spare, workers=2, max_workers=2, spares=1)
    assert_same_bits(result)
    assert not recoveries(result)
    assert [event.worker for event in losses(result)] == [2]


@pytest.mark.parametrize("leaver", [0, 1, 2, 3])
def test_a_drained_worker_leaves_and_nothing_is_lost(tmp_path: Path, leaver: int) -> None:
    def drain(run: ChaosRun) -> None:
        run.host.post(Drain(leaver, "spot notice", 30.0))
        until_a_change_is_ordered(run)

    run, result = run_with(tmp_path, drain, workers=4)
    assert_same_bits(result)
    assert not recoveries(result) and not losses(result)
    (notice,) = events_of(result, DrainNotice)
    (left,) = events_of(result, WorkerLeft)
    assert notice.worker == left.worker == leaver and left.workers_after == 3
    run.assert_survivors_untouched({leaver})


def test_a_worker_tells_of_its_own_end(tmp_path: Path) -> None:
    """As on SIGTERM, with a replacement that comes in at the same boundary or a later one."""

    def term(run: ChaosRun) -> None:
        run.members[1].notice("SIGTERM", 10.0)
        until_a_change_is_ordered(run)

    _, result = run_with(tmp_path, term, workers=3, max_workers=3, steps=20)
    assert_same_bits(result, 20)
    assert [event.worker for event in events_of(result, WorkerLeft)] == [1]
    assert not recoveries(result)


def test_the_last_worker_stays_until_somebody_replaces_it(tmp_path: Path) -> None:
    def drain(run: ChaosRun) -> None:
        run.host.post(Drain(0, "spot notice", 30.0))
        until_a_change_is_ordered(run)

    _, result = run_with(tmp_path, drain, workers=1, stages=1, max_workers=1)
    assert_same_bits(result)
    assert [event.worker for event in events_of(result, WorkerLeft)] == [0]
    assert not recoveries(result)


def test_a_stuck_worker_is_replaced(tmp_path: Path) -> None:
    """The call returns when the worker has been given up; what comes after can do no harm."""

    def hang(run: ChaosRun) -> None:
        wait_until(lambda: run.dead, "somebody notices")

    # a busy machine may hold up a healthy worker for a second; that one must not be given up as well
    patience = Patience(beat_seconds=0.05, silence_seconds=30.0, stuck_seconds=3.0)
    _, result = run_with(tmp_path, hang, workers=3, max_workers=3, patience=patience, steps=20)
    assert_same_bits(result, 20)
    (lost,) = losses(result)
    assert lost.reason.startswith("stuck in one call")


def test_training_goes_on_without_a_controller(tmp_path: Path) -> None:
    """A new one learns from the workers where they stand, and what it missed is on record all the same."""
    steps = 40

    def lose_the_controller(run: ChaosRun) -> None:
        run.lose_controller()
        threading.Thread(target=take_over, args=(run,), daemon=True).start()

    def take_over(run: ChaosRun) -> None:
        wait_until(
            lambda: min(w.follower.version for w in run.members.values()) >= 12, "steps without a controller"
        )
        run.new_controller()

    _, result = run_with(tmp_path, lose_the_controller, workers=3, steps=steps)
    assert_same_bits(result, steps)
    assert not recoveries(result) and not losses(result)
    (restarted,) = events_of(result, ControllerRestarted)
    assert restarted.workers == 3 and restarted.step > 12
    assert [record.generation for record in result.steps] == [1] * steps


@pytest.mark.parametrize("victim", [0, 2])
def test_a_loss_without_a_controller_waits_for_the_next_one(tmp_path: Path, victim: int) -> None:
    steps = 12

    def lose_both(run: ChaosRun) -> None:
        run.lose_controller()
        run.kill(victim)
        run.new_controller()

    run, result = run_with(tmp_path, lose_both, workers=3, steps=steps, max_workers=3)
    assert_same_bits(result, steps)
    (recovered,) = recoveries(result)
    assert recovered.lost == (victim,)
    run.assert_survivors_untouched({victim})


@dataclass
class LateReplacement(ChaosRun):
    """A replacement comes when training has paused: one that is there before all have told what they hold
    leaves nothing to wait for."""

    paused: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.observe = lambda event: self.paused.set() if isinstance(event, Paused) else None
        super().__post_init__()

    def _bring(self, number: int) -> None:
        if self.paused.wait(30.0):
            super()._bring(number)


def test_training_resumes_when_enough_are_back(tmp_path: Path) -> None:
    job = toy_job(tmp_path, steps=STEPS, faults=(Fault(2, 3, "forward"),))
    result = LateReplacement(job, tmp_path, 3, min_workers=3, max_workers=3).run()
    assert_same_bits(result)
    assert len(events_of(result, Paused)) == len(events_of(result, Resumed)) == 1
    (recovered,) = recoveries(result)
    assert recovered.source == "peers" and recovered.workers_after == 3


def test_all_lost_and_replaced_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    def lose_all(run: ChaosRun) -> None:
        wait_until(lambda: run.controller.durable is not None, "a checkpoint")
        for worker in (0, 1):
            run.kill(worker)

    trigger = Trigger(5, 0)
    job = toy_job(tmp_path, build_data=partial(TriggeringTokens, 5, trigger), steps=STEPS, checkpoint_every=2)
    run = ChaosRun(job, tmp_path, 2, 1, max_workers=2)
    trigger.action = partial(lose_all, run)
    result = run.run()
    assert_same_bits(result)
    (recovered,) = events_of(result, Recovered)
    assert recovered.source == "checkpoint" and recovered.from_version >= 2
