"""Teams that share micro-batches: the bits of one process that computes the same slices by itself."""

from __future__ import annotations

import random
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from runtime.events import WorkerJoined
from strategies.job import Fault
from strategies.options import Precision
from tests.support.chaos import ChaosRun, Trigger, TriggeringTokens, losses, random_faults, recoveries
from tests.support.cluster import Result, toy_job
from tests.support.expected import Bits, reference_bits
from tests.support.models import Tokens
from tests.support.ray_jobs import wait_until
from tests.support.sequences import TOKENS, build_gpt, build_ladder, long_tokens

STEPS, SLICES, MICRO_BATCHES = 4, 5, 3
LAYOUTS = [(2, 1, 2), (3, 1, 2), (5, 2, 3), (4, 1, 4)]
"""Workers, stages, workers of a team: even and uneven, one team and several."""


class Pairs(Tokens):
    """Targets of one number a sample."""

    def micro_batch(self, step: int, micro_batch: int) -> Any:
        tokens_BT, targets_BT = super().micro_batch(step, micro_batch)
        return tokens_BT, targets_BT[:, 0]


@cache
def expected(steps: int = STEPS) -> Bits:
    return reference_bits(
        steps, build_model=build_gpt, data=long_tokens(), slices=SLICES, micro_batches=MICRO_BATCHES
    )


def run_of(
    folder: Path, workers: int, stages: int, team: int, *, max_workers: int | None = None, **changes: Any
) -> ChaosRun:
    parts = {"build_model": build_gpt, "build_data": long_tokens, "steps": STEPS} | changes
    parts["micro_batches"] = MICRO_BATCHES
    job = toy_job(folder, sequence=team, sequence_slices=SLICES, **parts)
    return ChaosRun(job, folder, workers, stages, max_workers=max_workers)


def assert_same_bits(result: Result, steps: int = STEPS) -> None:
    assert result.outcome == "completed", result.message
    assert result.bits == expected(steps)


@pytest.mark.parametrize(("workers", "stages", "team"), [(1, 1, 1), (3, 2, 1), *LAYOUTS])
def test_undisturbed(
    tmp_path: Path, held_out_alone: list[float], workers: int, stages: int, team: int
) -> None:
    run = run_of(tmp_path, workers, stages, team, held_out_every=2, held_out_micro_batches=3)
    result = run.run()
    assert_same_bits(result)
    plan = run.members[0].follower.plan
    assert plan is not None and sum(len(each) for each in plan.teams) == (workers if team > 1 else 0) - (
        (workers, team) == (3, 2)
    ), "in a group of three with teams of two one computes alone"
    if stages == 1:
        assert held_out(result) == held_out_alone != []


@pytest.fixture(scope="module")
def held_out_alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The held-out losses of one worker by itself."""
    folder = tmp_path_factory.mktemp("alone")
    return held_out(run_of(folder, 1, 1, 1, held_out_every=2, held_out_micro_batches=3).run())


def held_out(result: Result) -> list[float]:
    return [step.held_out_loss for step in result.steps if step.held_out_loss is not None]


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zero-bubble"])
def test_schedules(tmp_path: Path, schedule: str) -> None:
    chunks = 2 if schedule == "interleaved" else 1
    assert_same_bits(run_of(tmp_path, 4, 2, 2, schedule=schedule, chunks=chunks).run())


def test_replicas(tmp_path: Path) -> None:
    """The other sharding that keeps sums where they are made."""
    assert_same_bits(run_of(tmp_path, 3, 1, 2, sharding="ddp", faults=(Fault(1, 3, "backward"),)).run())


def test_recomputed_layers(tmp_path: Path) -> None:
    assert_same_bits(run_of(tmp_path, 3, 1, 3, precision=Precision(recompute=(1, 2))).run())


def test_ladder_residuals(tmp_path: Path) -> None:
    result = run_of(tmp_path, 4, 2, 2, build_model=build_ladder).run()
    expected = reference_bits(
        STEPS, build_model=build_ladder, data=long_tokens(), slices=SLICES, micro_batches=MICRO_BATCHES
    )
    assert (result.outcome, result.bits) == ("completed", expected)


@pytest.mark.parametrize("at", ["forward", "backward"])
@pytest.mark.parametrize(
    ("workers", "stages", "team", "victim"), [(2, 1, 2, 1), (3, 1, 2, 0), (5, 2, 3, 4), (4, 1, 4, 0)]
)
def test_one_loss(tmp_path: Path, workers: int, stages: int, team: int, victim: int, at: str) -> None:
    """Of whoever leads a team or follows; in mid-exchange the others are interrupted as everywhere."""
    run = run_of(tmp_path, workers, stages, team, faults=(Fault(victim, 3, at),))
    result = run.run()
    assert_same_bits(result)
    assert {event.worker for event in losses(result)} == {victim} and len(recoveries(result)) == 1
    run.assert_survivors_untouched({victim})


@pytest.mark.parametrize("seed", range(3))
def test_random_losses(tmp_path: Path, seed: int) -> None:
    """One to all but one die at random points, also in the recovery from one another."""
    rng = random.Random(seed)
    workers, team = rng.choice([3, 4, 5]), rng.choice([2, 3])
    victims = rng.sample(range(workers), rng.randint(1, workers - 1))
    faults = random_faults(rng, workers, victims, STEPS)
    run = run_of(tmp_path, workers, rng.choice([1, 2]), team, faults=faults, checkpoint_every=1)
    assert_same_bits(run.run())
    run.assert_survivors_untouched(run.dead)


@pytest.mark.parametrize(("workers", "stages", "team"), LAYOUTS[:2])
def test_one_join(tmp_path: Path, workers: int, stages: int, team: int) -> None:
    trigger = Trigger(3, 0)
    data = partial(TriggeringTokens, 5, trigger, length=TOKENS)
    changes = {"build_data": data, "steps": STEPS + 3, "max_workers": workers + 1}
    run = run_of(tmp_path, workers, stages, team, **changes)
    trigger.action = lambda: wait_until(lambda: run.controller.generation >= 2, "a planned change")
    result = run.run()
    assert_same_bits(result, STEPS + 3)
    joined = [event for event in result.events if isinstance(event, WorkerJoined)]
    assert [event.worker for event in joined] == [workers]


def test_two_losses_leave_one_worker(tmp_path: Path) -> None:
    """A team shrinks to one."""
    faults = (Fault(0, 2, "backward"), Fault(2, 3, "forward"))
    run = run_of(tmp_path, 3, 1, 3, faults=faults)
    assert_same_bits(run.run())
    plan = run.members[1].follower.plan
    assert plan is not None and (plan.workers, plan.teams) == ((1,), ())


@pytest.mark.parametrize(
    ("data", "message"),
    [(Tokens(5, length=3), "3 tokens cannot be cut into 5 slices"), (Pairs(5), "its first two dimensions")],
)
def test_data_that_cannot_be_divided_is_refused_before_training(
    tmp_path: Path, data: Tokens, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_of(tmp_path, 1, 1, 1, build_data=lambda: data).run()
