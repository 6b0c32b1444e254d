"""Checkpoints as the controller sees them: parts that are written, manifests, and the end of a run."""

from __future__ import annotations

from runtime.events import (
    CheckpointSkipped,
)
from runtime.protocol import (
    Finished,
    Leave,
    Unwritten,
)
from runtime.signals import (
    Committed,
    Durable,
    End,
    Lost,
    ManifestFailed,
    ManifestWritten,
    Output,
    WriteManifest,
)
from tests.support.controlled import Run, notes, of, sent


def finish_step_2(run: Run) -> list[Output]:
    run.step(1)
    return run.step(2)


def test_a_checkpoint_is_made_whole_when_all_parts_are_written() -> None:
    run = Run().form()
    finish_step_2(run)
    assert run.written(0, 2, 0, 64) == []
    assert run.written(2, 2, 128, 192) == []
    (order,) = of(run.written(1, 2, 64, 128), WriteManifest)
    assert (order.version, order.exponents) == (2, (7,))
    assert [file.name for file in order.files] == ["worker-0-g1", "worker-1-g1", "worker-2-g1"]
    assert run.written(1, 2, 64, 128) == [], "it is being written already"


def test_a_checkpoint_waits_for_its_steps_record() -> None:
    """Otherwise a run that goes on from it would lack that step in its log for ever."""
    run = Run().form()
    run.step(1)
    assert run.written(0, 2, 0, 192) == []
    assert [type(output) for output in run.step(2)] == [Committed, WriteManifest]


def test_parts_of_two_generations_make_no_checkpoint() -> None:
    run = Run().form()
    finish_step_2(run)
    run.written(0, 2, 0, 128, generation=1)
    assert run.written(1, 2, 64, 192, generation=2) == [], "they overlap: each was cut by another plan"
    (order,) = of(run.written(0, 2, 0, 64, generation=2), WriteManifest)
    assert {file.name for file in order.files} == {"worker-0-g2", "worker-1-g2"}


def test_an_older_checkpoint_is_not_made_after_a_newer_one() -> None:
    run = Run().form()
    finish_step_2(run)
    run.tell(ManifestWritten(Durable(2, "there", None)))
    assert run.written(0, 1, 0, 192) == [] and run.written(0, 2, 0, 192) == []
    assert run.controller.durable == Durable(2, "there", None)
    run.tell(ManifestWritten(Durable(1, "there", None)))
    assert run.controller.durable == Durable(2, "there", None)


def test_a_manifest_that_failed_is_not_tried_for_ever() -> None:
    run = Run().form()
    finish_step_2(run)
    assert of(run.written(0, 2, 0, 192), WriteManifest)
    assert run.tell(ManifestFailed(2)) == []
    assert [type(output) for output in run.step(3)] == [Committed]


def test_the_run_ends_when_all_finished_and_the_checkpoint_is_whole() -> None:
    run = Run(steps=2).form()
    finish_step_2(run)
    assert all(run.tell(Finished(worker, 1, 2)) == [] for worker in range(3))
    assert of(run.written(0, 2, 0, 192), WriteManifest)
    outputs = run.tell(ManifestWritten(Durable(2, "there", None)))
    assert of(outputs, End) == [End("completed", "completed after 2 of 2 steps")]
    assert set(sent(outputs, Leave)) == {0, 1, 2}


def test_a_last_checkpoint_that_fails_does_not_keep_the_run_from_ending() -> None:
    run = Run(steps=2).form()
    finish_step_2(run)
    (skipped,) = notes(run.tell(Unwritten(1, 2, "disk full")), CheckpointSkipped)
    assert skipped.problem == "disk full"
    run.tell(Finished(0, 1, 2)), run.tell(Finished(1, 1, 2))
    (end,) = of(run.tell(Finished(2, 1, 2)), End)
    assert end.outcome == "completed" and "could not be written" in end.message


def test_finished_counts_in_its_own_generation_only() -> None:
    run = Run(workers=2, steps=2).form()
    finish_step_2(run)
    run.tell(ManifestWritten(Durable(2, "there", None)))
    run.tell(Finished(0, 1, 2))
    run.tell(Lost(1, "died"))
    assert run.tell(Finished(0, 1, 2)) == []
    run.holds(0, 2)
    assert run.tell(Finished(0, 1, 2)) == [], "said before it was interrupted"
    assert of(run.tell(Finished(0, 2, 2)), End)


# --- the rest -------------------------------------------------------------------------------
