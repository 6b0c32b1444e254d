"""Micro-batches on paths over part of the model: the bits of one plain process that is told the paths."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from runtime.events import WorkerJoined
from strategies.job import Fault
from strategies.paths import find_paths
from tests.support.chaos import ChaosRun, Trigger, TriggeringTokens, losses, recoveries
from tests.support.cluster import Result, toy_job
from tests.support.expected import Bits, reference_bits
from tests.support.models import Tokens, build
from tests.support.ray_jobs import wait_until

STEPS, MICRO_BATCHES = 5, 6
DEEP = partial(build, depth=6)
"""Eight layers: the embedding, six that may be skipped, the head."""

PATHS = find_paths(8, MICRO_BATCHES, stages=5, taken=3)
REORDERED = find_paths(8, MICRO_BATCHES, stages=6, taken=6, swaps=2)
LAYOUTS = [(1, 1), (2, 2), (4, 3), (7, 4)]
"""Workers, stage groups."""


@cache
def expected(steps: int = STEPS, paths: Any = PATHS) -> Bits:
    orders = [paths.layers_of(path) for path in paths.of]
    return reference_bits(steps, build_model=DEEP, micro_batches=MICRO_BATCHES, orders=orders)


def run_of(folder: Path, workers: int, groups: int, paths: Any = PATHS, **changes: Any) -> ChaosRun:
    max_workers = changes.pop("max_workers", None)
    values = {"steps": STEPS, "micro_batches": MICRO_BATCHES, "build_model": DEEP, "paths": paths}
    job = toy_job(folder, schedule="skippipe", **{**values, **changes})
    return ChaosRun(job, folder, workers, groups, max_workers=max_workers)


def assert_same_bits(result: Result, bits: Bits) -> None:
    assert result.outcome == "completed", result.message
    assert result.bits == bits


def test_the_paths_skip_and_swap() -> None:
    assert all(len(path) == 4 for path in PATHS.of) and len(set(PATHS.of)) > 1
    assert any(path != tuple(sorted(path)) for path in REORDERED.of)
    whole = reference_bits(STEPS, build_model=DEEP, micro_batches=MICRO_BATCHES)
    assert expected() != whole and expected(paths=REORDERED) != whole


@pytest.mark.parametrize(("workers", "groups"), LAYOUTS)
@pytest.mark.parametrize("paths", [PATHS, REORDERED], ids=["skipped", "reordered"])
def test_undisturbed(tmp_path: Path, workers: int, groups: int, paths: Any) -> None:
    assert_same_bits(run_of(tmp_path, workers, groups, paths).run(), expected(paths=paths))


@pytest.mark.parametrize(("workers", "groups"), LAYOUTS)
def test_without_skipping_the_bits_are_those_of_every_schedule(
    tmp_path: Path, workers: int, groups: int
) -> None:
    paths = find_paths(8, MICRO_BATCHES, stages=4, taken=4)
    whole = reference_bits(STEPS, build_model=DEEP, micro_batches=MICRO_BATCHES)
    assert_same_bits(run_of(tmp_path, workers, groups, paths).run(), whole)


@pytest.mark.parametrize("at", ["forward", "backward", "reduce", "gather"])
@pytest.mark.parametrize(("workers", "groups"), LAYOUTS[1:])
def test_one_loss(tmp_path: Path, workers: int, groups: int, at: str) -> None:
    for victim in range(0, workers, 2):
        faults = (Fault(victim, 3, at),)
        run = run_of(tmp_path / f"{victim}", workers, groups, faults=faults)
        result = run.run()
        assert_same_bits(result, expected())
        assert [event.worker for event in losses(result)] == [victim] and len(recoveries(result)) == 1
        run.assert_survivors_untouched({victim})


@pytest.mark.parametrize(("workers", "groups"), LAYOUTS[1:])
def test_a_step_that_is_done_again(tmp_path: Path, workers: int, groups: int) -> None:
    faults = (Fault(workers - 1, 3, "backward"),)
    result = run_of(tmp_path, workers, groups, REORDERED, faults=faults, salvage=False).run()
    assert_same_bits(result, expected(paths=REORDERED))
    assert len(recoveries(result)) == 1


@pytest.mark.parametrize(("workers", "groups"), LAYOUTS)
def test_one_join(tmp_path: Path, workers: int, groups: int) -> None:
    trigger = Trigger(3, 0)
    data = partial(TriggeringTokens, 5, trigger)
    run = run_of(tmp_path, workers, groups, steps=STEPS + 3, build_data=data, max_workers=workers + 1)
    trigger.action = lambda: wait_until(lambda: run.controller.generation >= 2, "a planned change")
    result = run.run()
    assert_same_bits(result, expected(STEPS + 3))
    assert [e.worker for e in result.events if isinstance(e, WorkerJoined)] == [workers]


def test_samples_are_those_of_every_micro_batch(tmp_path: Path) -> None:
    result = run_of(tmp_path, 3, 2, build_data=partial(Tokens, 5)).run()
    assert {record.samples for record in result.steps} == {2 * MICRO_BATCHES}
