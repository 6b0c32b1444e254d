"""Stopping, pausing and resuming, with other workers and stages: the bits of an uninterrupted run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.checkpoint import CheckpointReader, list_checkpoints, load_manifest
from runtime.events import CheckpointSkipped, Event, Paused, RunFinished
from runtime.fabric.interface import Interrupted
from runtime.run_folder import RunFolder
from runtime.sentences import sentence
from strategies.job import Fault
from tests.support.chaos import (
    ChaosRun,
    Trigger,
    TriggeringTokens,
    layout_of,
    losses,
    newest_checkpoint,
    recoveries,
    resume,
)
from tests.support.cluster import PATIENCE, Result, toy_job
from tests.support.expected import Bits, toy_bits

STEPS = 8


def bits_in_log(folder: Path) -> Bits:
    """What the run folder says of the whole run, over all its starts."""
    steps = RunFolder(folder).read_steps().steps
    assert [record.step for record in steps] == list(range(1, len(steps) + 1))
    return [(record.loss, record.grad_norm, record.fingerprint) for record in steps]


def stopped_at(
    folder: Path, step: int, workers: int, stages: int, start: Any = None, **changes: Any
) -> Result:
    """A run that a person stops while step ``step`` is being computed."""
    trigger = Trigger(step, 1)
    job = toy_job(folder, steps=STEPS, build_data=partial(TriggeringTokens, 5, trigger), **changes)
    run = ChaosRun(job, folder, workers, stages, start=start)

    def stop() -> None:
        run.host.stop()
        # wait for it to arrive, so that it cannot come after the last step; the dead never hear of it
        endpoints = run.fabric.endpoints
        while not all(worker.follower.stop or endpoints[w]._closed for w, worker in run.members.items()):
            time.sleep(0.001)

    trigger.action = stop
    return run.run()


def test_four_then_three_then_five_workers(tmp_path: Path) -> None:
    job = toy_job(tmp_path, steps=STEPS)
    first = stopped_at(tmp_path, 3, 4, 2)
    assert first.outcome == "interrupted", first.message
    durable, problems = newest_checkpoint(job)
    assert durable is not None and problems == []
    assert 2 <= durable.version == len(first.steps) <= 5, "it stops at a boundary soon after the request"
    second = stopped_at(tmp_path, durable.version + 2, 3, 3, start=durable)
    assert second.outcome == "interrupted", second.message
    assert second.steps[0].step == durable.version + 1
    third = resume(job, tmp_path, 5, 1)
    assert third.outcome == "completed", third.message
    assert first.bits + second.bits + third.bits == toy_bits(STEPS) == bits_in_log(tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [((4, 2), (1, 1)), ((1, 1), (6, 3)), ((2, 2), (3, "auto")), ((6, 3), (2, 1)), ((5, 1), (4, 4))],
)
def test_any_layout_goes_on_from_any_other(tmp_path: Path, before: Any, after: Any) -> None:
    first = stopped_at(tmp_path, 4, *before)
    second = resume(toy_job(tmp_path, steps=STEPS), tmp_path, *after)
    assert first.outcome == "interrupted" and second.outcome == "completed"
    assert first.bits + second.bits == toy_bits(STEPS)


def test_the_checkpoints_themselves_are_equal(tmp_path: Path) -> None:
    """Parameters and both moments, bit for bit, whoever wrote them."""
    states = []
    for workers, stages in [(1, 1), (3, 2), (6, 3)]:
        job = toy_job(tmp_path / f"{workers}", steps=4, checkpoint_every=2)
        ChaosRun(job, tmp_path / f"{workers}", workers, stages).run()
        assert list_checkpoints(job.checkpoint_root) == [2, 4]
        with CheckpointReader(job.checkpoint_root, load_manifest(job.checkpoint_root, 4)) as reader:
            states.append([reader.read_state(b.index, 0, b.size) for b in layout_of(job).blocks])
    assert all(bool(state.any(dim=1).all()) for state in states[0]), "no row of a state is all zero"
    for other in states[1:]:
        assert all(one.equal(two) for one, two in zip(states[0], other, strict=True))


def test_who_reads_a_checkpoint_hears_of_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading takes several times as long as anybody may take to say what it holds."""
    first = stopped_at(tmp_path, 3, 4, 2)
    job = toy_job(tmp_path, steps=STEPS)
    durable, _ = newest_checkpoint(job)
    patience = replace(PATIENCE, stuck_seconds=3.0)
    run = ChaosRun(job, tmp_path, 4, 2, start=durable, patience=patience)
    interrupted = []

    class SlowReader(CheckpointReader):
        def __init__(self, root: Any, manifest: Any, check: Callable[[], None]) -> None:
            is_first, chunks = not run.dead, itertools.count()

            def check_slowly() -> None:
                if is_first:
                    time.sleep(0.05)
                    if next(chunks) == 10 and not run.dead:
                        run.kill(3)
                try:
                    check()
                except Interrupted:
                    interrupted.append(1)
                    raise

            super().__init__(root, manifest, check_slowly)

    monkeypatch.setattr("runtime.checkpoint._CHUNK_BYTES", 256)
    monkeypatch.setattr("strategies.move.CheckpointReader", SlowReader)
    second = run.run()
    assert second.outcome == "completed", second.message
    assert interrupted and [event.worker for event in losses(second)] == [3]
    assert first.bits + second.bits == toy_bits(STEPS)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    job = toy_job(tmp_path, steps=4, checkpoint_every=2)
    ChaosRun(job, tmp_path, 3, 1).run()
    newest = Path(job.checkpoint_root) / "step-00000004"
    victim = sorted(newest.glob("*.safetensors"))[1]
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-5])
    elif damage == "flipped":
        content = bytearray(victim.read_bytes())
        content[-7] ^= 16
        victim.write_bytes(content)
    elif damage == "missing":
        victim.unlink()
    else:
        (newest / "manifest.json").unlink()
    durable, problems = newest_checkpoint(job)
    assert durable is not None and durable.version == 2
    assert len(problems) == 1 and "step-00000004" in problems[0]
    RunFolder(tmp_path).supersede_steps(3)
    longer = toy_job(tmp_path, steps=STEPS)
    result = resume(longer, tmp_path, 2, 2)
    assert result.outcome == "completed"
    assert result.bits == toy_bits(STEPS)[2:]
    assert bits_in_log(tmp_path) == toy_bits(STEPS)


def test_a_stop_while_training(tmp_path: Path) -> None:
    result = stopped_at(tmp_path, 3, 3, 2)
    assert result.outcome == "interrupted"
    finished = result.events[-1]
    assert isinstance(finished, RunFinished) and finished.outcome == "interrupted"
    assert result.durable is not None and result.durable.version == len(result.steps) < STEPS
    assert f"after {len(result.steps)} of {STEPS} steps" in result.message
    assert result.bits == toy_bits(STEPS)[: len(result.bits)]


@pytest.mark.parametrize("at", ["forward", "exchange", "gather", "checkpoint"])
def test_a_loss_while_stopping(tmp_path: Path, at: str) -> None:
    """The stop is asked for in the step in which a worker dies: still a checkpoint, still the bits."""
    faults = tuple(Fault(1, step, at) for step in range(3, STEPS + 1))
    result = stopped_at(tmp_path, 3, 4, 2, faults=faults, checkpoint_every=1)
    assert result.outcome == "interrupted", result.message
    second = resume(toy_job(tmp_path, steps=STEPS), tmp_path, 2, 2)
    assert second.outcome == "completed"
    assert result.bits + second.bits == toy_bits(STEPS)


@pytest.mark.parametrize(
    ("workers", "stages", "at"), [(3, 1, "reduce"), (4, 2, "backward"), (2, 2, "gather")]
)
def test_below_min_workers_the_run_pauses_and_keeps_its_state(
    tmp_path: Path, workers: int, stages: int, at: str
) -> None:
    job = toy_job(tmp_path, steps=STEPS, faults=(Fault(1, 4, at),))
    paused: list[Paused] = []

    def stop_when_paused(event: Event) -> None:
        if isinstance(event, Paused):
            paused.append(event)
            run.host.stop()

    run = ChaosRun(job, tmp_path, workers, stages, min_workers=workers, observe=stop_when_paused)
    first = run.run()
    (event,) = paused
    assert (event.workers, event.min_workers) == (workers - 1, workers)
    assert "paused" in sentence(event) and "state is kept" in sentence(event)
    assert first.outcome == "interrupted", first.message
    assert first.durable is not None and first.durable.version >= 2, "no more than a finished step is lost"
    assert recoveries(first)[-1].source == "peers"
    second = resume(toy_job(tmp_path, steps=STEPS), tmp_path, workers, stages)
    assert second.outcome == "completed"
    assert first.bits == toy_bits(STEPS)[: first.durable.version]
    assert first.bits + second.bits == toy_bits(STEPS) == bits_in_log(tmp_path)


def test_a_checkpoint_that_cannot_be_written_does_not_stop_training(tmp_path: Path) -> None:
    root = tmp_path / "occupied"
    root.write_text("a file where the folder should be")
    job = toy_job(tmp_path, checkpoint_root=str(root), checkpoint_every=2)
    result = ChaosRun(job, tmp_path / "run", 2, 1).run()
    assert result.bits == toy_bits()
    assert result.outcome == "completed" and "last checkpoint could not be written" in result.message
    assert any(isinstance(event, CheckpointSkipped) for event in result.events)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    job = toy_job(tmp_path, steps=6, checkpoint_every=1)
    ChaosRun(job, tmp_path, 2, 2, keep=2).run()
    kept = list_checkpoints(job.checkpoint_root)
    assert kept[-1] == 6 and len(kept) <= 2


def test_a_finished_run_resumed_further_goes_on(tmp_path: Path) -> None:
    ChaosRun(toy_job(tmp_path, steps=3), tmp_path, 3, 2).run()
    result = resume(toy_job(tmp_path, steps=STEPS), tmp_path, 2, 1)
    assert result.bits == toy_bits(STEPS)[3:]
