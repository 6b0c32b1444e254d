"""DeepSpeed engines on real Ray: workers are lost and come in, and the run is that of one plain process.

DeepSpeed sums gradients in floating point, in an order that depends on the size of the group: runs of
different sizes agree within a tolerance, runs of the same size bit for bit.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from actors.cluster import RayRun
from actors.recorder import RunProgress
from jobs.assembly import optimizer_settings
from jobs.recipe.recipe import Recipe
from jobs.train import train
from jobs.universal import import_checkpoint
from runtime.checkpoint import CheckpointReader, load_manifest
from runtime.events import Event, Recovered, StepRecord, WorkerJoined
from runtime.run_folder import RunFolder
from strategies.model import describe
from tests.support.expected import reference_steps
from tests.support.models import build
from tests.support.ray_cluster import local_ray
from tests.support.ray_jobs import PACED, toy_recipe, wait_until
from tests.support.watched import FOR_EVER, start

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

STEPS = 12
TOLERANCE = 2e-5
"""Relative, of every loss: measured deviations are below 1e-6 in these few steps."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_ray(1):
        yield


def recipe_of(name: str, stage: int, steps: int = STEPS, **sections: Any) -> Recipe:
    parallel = {"micro_batches": 5, "micro_batch_size": 2, "cpus_per_worker": 0.25}
    parallel |= sections.pop("parallel", {"workers": 2})
    # every parameter is really divided, however small
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    engine = {"name": "deepspeed", "settings": {"zero_optimization": zero}}
    return toy_recipe(name, steps, 2, "auto", **{"parallel": parallel, "engine": engine, **sections})


@contextmanager
def started(folder: Path, recipe: Recipe) -> Iterator[RayRun]:
    with start(folder, recipe) as run:
        yield run


def to_the_end(run: RayRun) -> RunProgress:
    wait_until(lambda: run.wait(1.0), "the end")
    run.finish()
    progress = run.progress(0, 0)
    assert progress.outcome == "completed", progress.message
    return progress


def assert_close(recipe: Recipe, steps: Sequence[StepRecord]) -> None:
    """Losses are those of one process within the tolerance, gradient norms where DeepSpeed says them."""
    expected = reference_steps(len(steps), optimizer=optimizer_settings(recipe))
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert all(step.samples == 10 for step in steps), "the batch never shrinks"
    for found, wanted in zip(steps, expected, strict=True):
        # deviations add up in a run that is stopped when the test has seen enough
        tolerance = TOLERANCE if found.step <= STEPS else 1e-3
        assert found.loss == pytest.approx(wanted.loss, rel=tolerance)
        if found.step <= STEPS and recipe.engine.settings["zero_optimization"]["stage"]:
            assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-3)


def lost(events: Iterable[Event]) -> list[int]:
    recovered = [event for event in events if isinstance(event, Recovered)]
    assert all(event.source == "peers" for event in recovered), "no step is taken from disk"
    return [worker for event in recovered for worker in event.lost]


def test_a_group_of_the_same_size_gives_the_same_bits(tmp_path: Path, cluster: None) -> None:
    """A worker that stands by takes the lost one's place at once: nothing shows that anything happened.

    With ZeRO-2; and when another one is lost, whoever is there by then goes on.
    """
    standing_by = {"workers": 2, "max_workers": 2, "spares": 1}
    recipe = recipe_of("hurt", 2, FOR_EVER, parallel=standing_by, data=PACED)
    with started(tmp_path / "hurt", recipe) as run:

        def loses(victim: int) -> None:
            """Returns after three steps without it."""
            os.kill(run.processes()[victim], signal.SIGKILL)
            wait_until(lambda: victim in lost(run.progress(1 << 30, 0).events), "the loss is dealt with")
            reached = run.progress(1 << 30, 0).steps_total + 3
            wait_until(lambda: run.progress(1 << 30, 0).steps_total >= reached, "more steps")

        wait_until(lambda: len(run.processes()) == 3 and run.progress(0, 0).steps_total, "a spare worker")
        loses(0)
        in_company = run.progress(0, 0)
        assert lost(in_company.events) == [0] and {step.workers for step in in_company.steps} == {2}
        loses(1)
        hurt = run.progress(0, 0)
    assert lost(hurt.events) == [0, 1]
    assert_close(recipe, hurt.steps)
    with started(tmp_path / "calm", recipe_of("calm", 2, len(in_company.steps))) as run:
        calm = to_the_end(run)
    assert not lost(calm.events)
    assert bits(in_company) == bits(calm)


def bits(progress: RunProgress) -> list[tuple[float, float, int]]:
    return [(step.loss, step.grad_norm, step.fingerprint) for step in progress.steps]


def test_a_loss_while_engines_are_made_for_long_costs_nobody_else(tmp_path: Path, cluster: None) -> None:
    """Whoever makes one can be asked nothing meanwhile, for longer than a worker usually may not answer.

    With ZeRO-0, which divides nothing; below, ZeRO-3 and ZeRO-1.
    """
    arguments = {"folder": str(tmp_path), "seconds": 4.0}
    recipe = recipe_of(
        "heavy",
        0,
        FOR_EVER,
        parallel={"workers": 3},
        model={"build": "tests.support.toys:build_heavy", "arguments": arguments},
        data=PACED,
        detection={"silence_seconds": 30.0, "stuck_seconds": 1.5},
    )
    with started(tmp_path / "heavy-run", recipe) as run:
        wait_until(lambda: run.progress(1 << 30, 0).steps_total, "the first step")
        processes = run.processes()
        (tmp_path / "heavy").touch()
        os.kill(processes[2], signal.SIGKILL)
        for worker in (0, 1):
            wait_until((tmp_path / str(processes[worker])).exists, f"worker {worker} makes an engine")
        os.kill(processes[1], signal.SIGKILL)
        (tmp_path / "heavy").unlink()
        wait_until(lambda: 1 in lost(run.progress(1 << 30, 0).events), "the losses are dealt with")
        reached = run.progress(1 << 30, 0).steps_total + 3
        wait_until(lambda: run.progress(1 << 30, 0).steps_total >= reached, "more steps")
        progress = run.progress(0, 0)
    assert sorted(lost(progress.events)) == [1, 2] and progress.steps[-1].workers == 1
    assert_close(recipe, progress.steps)


def test_one_is_lost_another_one_joins_and_the_run_changes_engines(tmp_path: Path, cluster: None) -> None:
    """Steps by DeepSpeed's ZeRO-3 with a loss and a newcomer on the way, then by Reknit's own engine, then by
    DeepSpeed again, whose ZeRO-1 loses a worker too."""
    parallel = {"workers": 3, "max_workers": 3}
    faults = [{"step": 6, "worker": 1, "at": "forward"}]
    recipe = recipe_of("joined", 3, FOR_EVER, parallel=parallel, data=PACED, faults=faults)
    with started(tmp_path / "joined", recipe) as run:

        def joined() -> list[Any]:
            return [event for event in run.progress(1 << 30, 0).events if isinstance(event, WorkerJoined)]

        wait_until(joined, "a newcomer")
        reached = run.progress(1 << 30, 0).steps_total + 3
        wait_until(lambda: run.progress(1 << 30, 0).steps_total >= reached, "steps of three")
        run.stop()
        wait_until(lambda: run.wait(1.0), "the end")
        run.finish()
        first = run.progress(0, 0)
    assert first.outcome == "interrupted" and lost(first.events) == [1]
    workers = [step.workers for step in first.steps]
    assert [size for size, before in zip(workers, [0, *workers], strict=False) if size != before] == [3, 2, 3]
    version = len(first.steps)
    own = recipe_of("own", 0, version + 3, parallel={"workers": 1}, engine={"name": "reknit"})
    assert import_checkpoint(tmp_path / "joined", own, tmp_path / "own") == version
    assert torch.equal(state(tmp_path / "joined", version), state(tmp_path / "own", version))
    second = train(own, resume=True, run_folder=tmp_path / "own", console=Console(quiet=True))
    faults = [{"step": version + 6, "worker": 1, "at": "optimizer"}]
    back = recipe_of("back", 1, version + 8, faults=faults)
    assert import_checkpoint(tmp_path / "own", back, tmp_path / "back") == version + 3
    assert torch.equal(state(tmp_path / "own", version + 3), state(tmp_path / "back", version + 3))
    third = train(back, resume=True, run_folder=tmp_path / "back", console=Console(quiet=True))
    assert lost(third.events) == [1] and {step.workers for step in third.steps} == {2, 1}
    assert_close(recipe, (*first.steps, *second.steps, *third.steps))


def state(folder: Path, version: int) -> torch.Tensor:
    """All float32 state of a checkpoint: weights and both moments."""
    root = RunFolder(folder).checkpoints
    layers, _ = build()
    with CheckpointReader(str(root), load_manifest(str(root), version)) as reader:
        blocks = [reader.read_state(block.index, 0, block.size) for block in describe(layers).blocks]
    return torch.cat(blocks, dim=1)
