"""Micro-batches on paths over part of the model: the bits of one plain process that is told the paths."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from jobs.checkpoints import fill
from jobs.evaluate import mean_loss
from runtime.checkpoint import load_manifest
from runtime.events import WorkerJoined
from strategies.job import Fault
from strategies.model import describe
from strategies.skippipe.paths import find_paths
from tests.support.chaos import ChaosRun, Trigger, TriggeringTokens, losses, recoveries
from tests.support.cluster import Result, toy_job
from tests.support.expected import Bits, reference_bits
from tests.support.models import Tokens, build
from tests.support.ray_jobs import wait_until

STEPS, MICRO_BATCHES = 3, 6
DEEP = partial(build, depth=6)
"""Eight layers: the embedding, six that may be skipped, the head."""

PATHS = find_paths(8, MICRO_BATCHES, stages=5, taken=3)
REORDERED = find_paths(8, MICRO_BATCHES, stages=6, taken=6, swaps=2)


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


@pytest.mark.parametrize(("workers", "groups", "paths"), [(1, 1, PATHS), (5, 3, PATHS), (4, 3, REORDERED)])
def test_undisturbed(tmp_path: Path, workers: int, groups: int, paths: Any) -> None:
    run = run_of(tmp_path, workers, groups, paths, held_out_every=2, held_out_micro_batches=3)
    result = run.run()
    assert_same_bits(result, expected(paths=paths))
    assert {record.samples for record in result.steps} == {2 * MICRO_BATCHES}
    last = result.steps[-1]
    full, half = (held_out(run, paths.layers_of(path)) for path in (paths.full, paths.half))
    assert (last.held_out_loss, last.half_depth_loss) == (full, half) and full != half


def held_out(run: ChaosRun, order: tuple[int, ...]) -> float:
    """The loss of layers ``order`` with the parameters that the run ended with."""
    layers, loss = DEEP()
    root = run.job.checkpoint_root
    fill(layers, describe(layers), root, load_manifest(root, STEPS))
    return mean_loss(layers, loss, Tokens(5), order, 3)


def test_without_skipping_the_bits_are_those_of_every_schedule(tmp_path: Path) -> None:
    paths = find_paths(8, MICRO_BATCHES, stages=4, taken=4)
    whole = reference_bits(STEPS, build_model=DEEP, micro_batches=MICRO_BATCHES)
    assert_same_bits(run_of(tmp_path, 4, 3, paths).run(), whole)


@pytest.mark.parametrize(
    ("victim", "at", "salvage"),
    [
        (0, "forward", True),
        (1, "backward", True),
        (2, "reduce", True),
        (3, "gather", True),
        (3, "backward", False),
    ],
)
def test_one_loss(tmp_path: Path, victim: int, at: str, salvage: bool) -> None:
    paths = PATHS if salvage else REORDERED
    run = run_of(tmp_path, 5, 3, paths, faults=(Fault(victim, 2, at),), salvage=salvage)
    result = run.run()
    assert_same_bits(result, expected(paths=paths))
    assert [event.worker for event in losses(result)] == [victim] and len(recoveries(result)) == 1
    run.assert_survivors_untouched({victim})


@pytest.mark.parametrize("sharding", ["ddp", "zero2", "zero3"])
def test_every_sharding(tmp_path: Path, sharding: str) -> None:
    changes = {"held_out_every": 2, "held_out_micro_batches": 2, "sharding": sharding}
    result = run_of(tmp_path, 5, 2, faults=(Fault(3, 2, "backward"),), **changes).run()
    assert_same_bits(result, expected())
    assert len(recoveries(result)) == 1 and result.steps[-1].half_depth_loss is not None


def test_one_join(tmp_path: Path) -> None:
    trigger = Trigger(2, 0)
    data = partial(TriggeringTokens, 5, trigger)
    run = run_of(tmp_path, 3, 2, steps=STEPS + 2, build_data=data, max_workers=4)
    trigger.action = lambda: wait_until(lambda: run.controller.generation >= 2, "a planned change")
    result = run.run()
    assert_same_bits(result, expected(STEPS + 2))
    assert [e.worker for e in result.events if isinstance(e, WorkerJoined)] == [3]


def test_layers_of_different_forms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers 2 and 3 take inputs of different forms"):
        run_of(tmp_path, 1, 1, build_model=wider).run()


def wider() -> tuple[list[nn.Module], Any]:
    layers, loss = DEEP()
    return [*layers[:2], nn.Linear(24, 12), *build(width=12, depth=4)[0][1:5], nn.Linear(12, 37)], loss
