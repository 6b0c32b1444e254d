"""Whoever dies whenever: the bits stay, survivors stay as they are, at most one step is done again."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.run_folder import RunFolder
from runtime.sentences import sentence
from strategies.job import Fault
from tests.support.chaos import ChaosRun, Trigger, TriggeringTokens, losses, random_faults, recoveries
from tests.support.cluster import Result, toy_job
from tests.support.expected import toy_bits
from tests.support.models import build
from tests.support.ray_jobs import wait_until

STEPS = 5
CERTAIN = ("reduce", "exchange", "optimizer", "gather", "backup")
BEFORE_COMMIT = ("forward", "backward", "reduce", "exchange")
POINTS = (*BEFORE_COMMIT, "optimizer", "gather", "backup")


def assert_nothing_happened_to_the_result(run: ChaosRun, result: Result) -> None:
    """Every step once, in order, with the reference's bits; survivors as they were built."""
    assert result.outcome == "completed", result.message
    assert [record.step for record in result.steps] == list(range(1, STEPS + 1))
    assert result.bits == toy_bits(STEPS)
    logged = RunFolder(run.folder).read_steps().steps
    assert [(s.loss, s.grad_norm, s.fingerprint) for s in logged] == toy_bits(STEPS)
    assert all(record.samples == 10 for record in result.steps), "the global batch never changes"
    run.assert_survivors_untouched({event.worker for event in losses(result)})


def chaos(folder: Path, faults: Iterable[Fault], workers: int, stages: int, **changes: Any) -> ChaosRun:
    names = ("together", "domains", "observe", "min_workers")
    of_run = {name: changes.pop(name) for name in names if name in changes}
    return ChaosRun(toy_job(folder, faults=tuple(faults), **changes), folder, workers, stages, **of_run)


@pytest.mark.parametrize("seed", range(50))
def test_random_losses(tmp_path: Path, seed: int) -> None:
    """One to all but one of the workers die at random points, also in the recovery from one another."""
    rng = random.Random(seed)
    workers = rng.choice([2, 3, 4, 5])
    stages = min(workers, rng.choice([1, 2, 3]))
    victims = rng.sample(range(workers), rng.randint(1, workers - 1))
    faults = random_faults(rng, workers, victims, STEPS)
    run = chaos(tmp_path, faults, workers, stages, checkpoint_every=rng.choice([0, 1, 2]))
    result = run.run()
    assert_nothing_happened_to_the_result(run, result)
    # every worker comes past these points in every step, so the fault did happen
    certain = {fault.worker for fault in faults if fault.at in CERTAIN}
    assert certain <= {event.worker for event in losses(result)} <= set(victims)


PLACES = ((2, 1, 0), (2, 2, 1), (4, 2, 0), (4, 2, 3))
"""Workers, stages, victim: every other one for each point."""

SINGLE = [
    (*place, at)
    for row, at in enumerate(POINTS)
    for column, place in enumerate(PLACES)
    if (row + column) % 2 == 0
]


@pytest.mark.parametrize(("workers", "stages", "victim", "at"), SINGLE)
def test_a_single_loss_costs_at_most_one_step(
    tmp_path: Path, workers: int, stages: int, victim: int, at: str
) -> None:
    """Work goes on from a finished step whose copies are in place: at most one finished step is redone.

    Copies of step s are in place once the exchange of step s + 1 is through; they may be earlier.
    """
    step = 3
    run = chaos(tmp_path, [Fault(victim, step, at)], workers, stages)
    result = run.run()
    assert_nothing_happened_to_the_result(run, result)
    (event,) = recoveries(result)
    assert event.lost == (victim,)
    assert (event.workers_before, event.workers_after) == (workers, workers - 1)
    assert event.source == "peers"
    assert event.from_version in ([step - 2, step - 1] if at in BEFORE_COMMIT else [step - 1, step])


@pytest.mark.parametrize("seed", range(8))
def test_a_whole_domain_dies(tmp_path: Path, seed: int) -> None:
    """Backups lie in another failure domain, so the loss of all its workers at once is survived."""
    rng = random.Random(1000 + seed)
    workers = rng.choice([3, 4, 5, 6])
    racks = rng.choice([2, 3])
    domains = {worker: f"rack-{worker % racks}" for worker in range(workers)}
    dying = rng.randrange(racks)
    group = frozenset(worker for worker in range(workers) if worker % racks == dying)
    step, at = rng.randint(1, STEPS), rng.choice(POINTS)
    fault = Fault(rng.choice(sorted(group)), step, at)
    run = chaos(
        tmp_path, [fault], workers, min(workers, rng.choice([1, 2, 3])), domains=domains, together=[group]
    )
    result = run.run()
    assert_nothing_happened_to_the_result(run, result)
    assert {event.worker for event in losses(result)} == group
    # in the first step a survivor may still be building the initial state when it is interrupted
    sources = {"peers", "initial"} if step == 1 else {"peers"}
    assert {event.source for event in recoveries(result)} <= sources
    safe = step - 2 if at in BEFORE_COMMIT else step - 1
    assert all(event.from_version >= safe for event in recoveries(result))


@pytest.mark.parametrize("seed", range(8))
def test_two_die_at_once_in_different_domains(tmp_path: Path, seed: int) -> None:
    """Perhaps an owner with its backup: then the run goes back further, to the same bits."""
    rng = random.Random(2000 + seed)
    workers = rng.choice([3, 4, 5])
    pair = frozenset(rng.sample(range(workers), 2))
    step, at = rng.randint(1, STEPS), rng.choice(POINTS)
    run = chaos(
        tmp_path,
        [Fault(min(pair), step, at)],
        workers,
        min(workers, rng.choice([1, 2, 3])),
        together=[pair],
        checkpoint_every=rng.choice([0, 2]),
    )
    result = run.run()
    assert_nothing_happened_to_the_result(run, result)
    assert {event.worker for event in losses(result)} == pair


@pytest.mark.parametrize("seed", range(8))
def test_killed_from_outside(tmp_path: Path, seed: int) -> None:
    """The victim does not choose the moment: another thread's progress does."""
    rng = random.Random(3000 + seed)
    workers = rng.choice([2, 3, 4])
    trigger = Trigger(rng.randint(2, STEPS), rng.randrange(5))
    run = chaos(
        tmp_path,
        [],
        workers,
        min(workers, rng.choice([1, 2, 3])),
        build_data=partial(TriggeringTokens, 5, trigger),
    )
    victim = rng.randrange(workers)
    trigger.action = partial(run.kill, victim)
    result = run.run()
    assert_nothing_happened_to_the_result(run, result)
    (event,) = recoveries(result)
    assert event.lost == (victim,) and event.source == "peers"
    assert event.from_version in (trigger.step - 2, trigger.step - 1)


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_owner_and_backup_are_lost(tmp_path: Path, checkpoint_every: int) -> None:
    """Three of four die at once: their shards' backups too. The newest checkpoint counts, else the seed."""
    trigger = Trigger(5, 0)
    data = partial(TriggeringTokens, 5, trigger)
    group = frozenset({0, 1, 2})
    run = chaos(tmp_path, [], 4, 1, together=[group], checkpoint_every=checkpoint_every, build_data=data)

    def die() -> None:
        if checkpoint_every:  # they are written behind the training's back
            wait_until(lambda: run.controller.durable is not None, "a checkpoint")
        run.kill(1)

    trigger.action = die
    result = run.run()
    assert_nothing_happened_to_the_result(run, result)
    (event,) = [event for event in recoveries(result) if event.source != "peers"]
    text = sentence(event)
    if checkpoint_every:
        assert event.source == "checkpoint" and 1 <= event.from_version <= 4
        assert (
            f"from the checkpoint of step {event.from_version}: newer state was lost with its backups" in text
        )
    else:
        assert event.source == "initial" and event.from_version == 0
        assert "from the initial state" in text and "there is no checkpoint" in text


def test_a_stage_that_lost_everybody_is_rebuilt(tmp_path: Path) -> None:
    """Both workers of a stage share a domain and die; the others take its layers from their backups."""
    domains = {0: "a", 1: "b", 2: "a", 3: "b"}
    for number, group in enumerate([frozenset({0, 1}), frozenset({2, 3}), frozenset({0, 2})]):
        same = dict.fromkeys(group, "dying")
        run = chaos(
            tmp_path / f"{number}",
            [Fault(max(group), 3, "backward")],
            4,
            2,
            domains={**domains, **same},
            together=[group],
        )
        result = run.run()
        assert_nothing_happened_to_the_result(run, result)
        assert recoveries(result)[-1].source == "peers" and recoveries(result)[-1].from_version >= 1


def test_one_after_another_to_the_last(tmp_path: Path) -> None:
    """Five, four, three, two, one: a loss in every step."""
    faults = [Fault(worker, worker + 1, "backward") for worker in range(4)]
    run = chaos(tmp_path, faults, 5, 2)
    result = run.run()
    assert_nothing_happened_to_the_result(run, result)
    assert [event.workers_after for event in recoveries(result)] == [4, 3, 2, 1]
    assert [event.source for event in recoveries(result)] == ["peers"] * 4


def test_a_loss_during_the_recovery_from_another(tmp_path: Path) -> None:
    second = [Fault(worker, step, "recovery") for worker in (1, 2) for step in (2, 3)]
    faults = [Fault(3, 3, "reduce"), *second]
    run = chaos(tmp_path, faults, 4, 1, domains={0: "a", 1: "b", 2: "b", 3: "b"})
    result = run.run()
    assert_nothing_happened_to_the_result(run, result)
    assert {event.worker for event in losses(result)} == {1, 2, 3}
    assert recoveries(result)[-1].workers_after == 1
    assert {event.source for event in recoveries(result)} == {"peers"}


def test_the_survivors_build_no_model(tmp_path: Path) -> None:
    """The builder is called twice per worker, all at the start: for its layers and for its first values."""
    calls: Counter[str] = Counter()

    def counted() -> Any:
        calls["build"] += 1
        return build()

    run = chaos(tmp_path, [Fault(2, 3, "gather")], 4, 2, build_model=counted)
    assert_nothing_happened_to_the_result(run, run.run())
    assert calls["build"] == 8
    assert len(run.fabric.endpoints) == 5, "four workers and the controller, none of them twice"


def test_fast_sums_survive_a_loss_too(tmp_path: Path) -> None:
    """Without exact sums the bits depend on the layout, the course of training does not."""
    run = chaos(tmp_path, [Fault(1, 3, "reduce")], 3, 1, reduction="fast")
    result = run.run()
    assert result.outcome == "completed"
    assert [record.step for record in result.steps] == [1, 2, 3, 4, 5]
    for record, (loss, norm, _) in zip(result.steps, toy_bits(), strict=True):
        assert record.loss == pytest.approx(loss, rel=1e-4) and record.grad_norm == pytest.approx(
            norm, rel=1e-4
        )


def test_all_lost_is_the_end(tmp_path: Path) -> None:
    run = chaos(tmp_path, [Fault(0, 3, "forward")], 3, 1, together=[frozenset({0, 1, 2})])
    result = run.run()
    assert result.outcome == "failed" and "every worker was lost" in result.message
    assert result.bits == toy_bits()[: len(result.bits)]
