"""Real processes on real Ray, killed by real signals: the bits of one plain process all the same."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from actors.cluster import RayRun
from jobs.assembly import assemble, run_settings
from jobs.train import train
from runtime.checkpoint import list_checkpoints
from runtime.events import Recovered
from runtime.run_folder import RunFolder
from tests.support.expected import Bits
from tests.support.ray_cluster import local_ray
from tests.support.ray_jobs import (
    TOKEN,
    began_at,
    descendants,
    recipe_bits,
    toy_recipe,
    wait_until,
    with_token,
)

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_ray(2):
        yield


def has_come_to(run: RayRun, step: int) -> bool:
    """Asks for the count alone: nothing is newer than what was seen."""
    return run.progress(1 << 30, 1 << 30).steps_total >= step


def bits_in_log(path: Path) -> Bits:
    steps = RunFolder(path).read_steps().steps
    assert [record.step for record in steps] == list(range(1, len(steps) + 1))
    return [(record.loss, record.grad_norm, record.fingerprint) for record in steps]


def test_sigkill_at_any_moment(tmp_path: Path, cluster: None) -> None:
    """Three kill themselves at a point of the recipe, two more are killed from outside whenever the run has
    come so far; one is left."""
    workers, faults = 6, [(5, 8, "backward"), (0, 12, "checkpoint"), (2, 16, "gather")]
    rng = random.Random(1)
    recipe = toy_recipe(
        "killed",
        75,
        workers,
        2,
        checkpoint={"every": 6, "keep": 2},
        faults=[{"worker": worker, "step": step, "at": at} for worker, step, at in faults],
    )
    RunFolder.create(tmp_path, recipe.to_toml(), {})
    job = assemble(recipe, str(tmp_path / "checkpoints"))
    by_fault = {worker for worker, _, _ in faults}
    outside = rng.sample(sorted(set(range(workers)) - by_fault), 2)
    moments = sorted(rng.sample(range(18, 50), 2))
    dead = {*by_fault, *outside}
    with RayRun(job, run_settings(recipe, tmp_path)) as run:
        wait_until(partial(has_come_to, run, 1), "the first step")
        processes = run.processes()
        born = {worker: began_at(process) for worker, process in processes.items()}
        assert len(set(processes.values())) == workers and all(born.values())
        for victim, moment in zip(outside, moments, strict=True):
            wait_until(partial(has_come_to, run, moment), f"step {moment}", interval=0.05)
            os.kill(processes[victim], signal.SIGKILL)
        wait_until(lambda: run.wait(1.0), "the end")
        run.finish()
        progress = run.progress(0, 0)
        assert progress.outcome == "completed", progress.message
        assert run.processes() == processes
        for worker, process in processes.items():
            # a survivor has ended with the run, or is the process that it was
            left = (None,) if worker in dead else (None, born[worker])
            assert began_at(process) in left, f"worker {worker}"
    expected = recipe_bits(recipe)
    assert [(s.loss, s.grad_norm, s.fingerprint) for s in progress.steps] == expected == bits_in_log(tmp_path)
    recovered = [event for event in progress.events if isinstance(event, Recovered)]
    assert {worker for event in recovered for worker in event.lost} == dead
    assert progress.steps[-1].workers == workers - len(dead)
    wait_until(lambda: not any(map(began_at, processes.values())), "the workers' processes have ended")


def test_killed_in_a_checkpoint_then_interrupted_then_resumed(tmp_path: Path, cluster: None) -> None:
    """First everything is killed with SIGKILL while a checkpoint is being written, the driver and Ray
    itself too; the resumed run gets a Ctrl-C; a third one with another number of workers finishes."""
    recipe = toy_recipe("cut", 4000, 2, 2, checkpoint={"every": 1, "keep": 2})
    file, run, checkpoints = tmp_path / "cut.toml", tmp_path / "run", tmp_path / "run" / "checkpoints"
    file.write_text(recipe.to_toml())
    command = [sys.executable, "-m", "jobs.train", str(file), "--run-folder", str(run)]

    first = secrets.token_hex(8)
    child = subprocess.Popen(command, cwd=ROOT, env=with_token(first), stdout=subprocess.DEVNULL, text=True)
    wait_until(lambda: checkpoints.is_dir() and len(list_checkpoints(checkpoints)) == 2, "two checkpoints")

    def being_written() -> bool:
        """A newer checkpoint has a file, but not yet its manifest."""
        newest = max(checkpoints.glob("step-*"))
        return any(newest.iterdir()) and not (newest / "manifest.json").exists()

    wait_until(being_written, "an unfinished checkpoint", interval=0.001)
    for process in descendants(first):
        os.kill(process, signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    wait_until(lambda: not descendants(first), "all processes are gone")
    done = len(bits_in_log(run))
    assert 0 < done < 4000

    second = secrets.token_hex(8)
    child = subprocess.Popen(
        [*command, "--resume"], cwd=ROOT, env=with_token(second), stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(RunFolder(run).read_steps().steps) > done + 5, "five more steps")
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 130, output
    assert "stopping at the next step boundary" in output
    stopped = len(bits_in_log(run))
    assert done + 5 < stopped < 4000
    assert list_checkpoints(checkpoints)[-1] == stopped
    wait_until(lambda: not descendants(second), "no process is left behind")

    shorter = recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update={"steps": stopped + 10}),
            "parallel": recipe.parallel.model_copy(update={"workers": 1, "stages": 1}),
        }
    )
    result = train(shorter, resume=True, run_folder=run)
    assert result.outcome == "completed" and len(result.steps) == 10
    assert bits_in_log(run) == recipe_bits(shorter)
    assert TOKEN not in os.environ
