from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.events import (
    KINDS,
    CheckpointSkipped,
    CheckpointWritten,
    ControllerRestarted,
    DemandCapped,
    DrainNotice,
    Event,
    FaultInjected,
    FeedWorkerLost,
    FeedWorkerReplaced,
    Paused,
    Rebalanced,
    RecordLost,
    Recovered,
    RecoverySeconds,
    Resized,
    Resumed,
    RunFinished,
    RunStarted,
    StepRecord,
    StepRepeated,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
    from_json,
    step_from_json,
    step_to_json,
    to_json,
)
from runtime.sentences import sentence

SECONDS = RecoverySeconds(0.01, 0.02, 0.0, 0.01, 0.05)

SENTENCES: list[tuple[Event, str]] = [
    (
        Recovered(41, (3,), "process died", 4, 3, SECONDS, "peers", 41, 123456),
        "step 41  worker 3 lost (process died): 4 -> 3 workers, recovered in 0.09 s "
        "(detect 0.01, agree 0.02, plan 0.00, move 0.01, redo 0.05)",
    ),
    (
        Recovered(40, (1, 3), "node lost", 4, 2, SECONDS, "checkpoint", 40, 0),
        "step 40  workers 1, 3 lost (node lost): 4 -> 2 workers, recovered in 0.09 s "
        "(detect 0.01, agree 0.02, plan 0.00, move 0.01, redo 0.05) from the checkpoint of step 40: "
        "newer state was lost with its backups",
    ),
    (
        Recovered(0, (), "worker slow", 2, 2, SECONDS, "initial", 0, 0),
        "step 0  worker slow: 2 -> 2 workers, recovered in 0.09 s "
        "(detect 0.01, agree 0.02, plan 0.00, move 0.01, redo 0.05) from the initial state: "
        "newer state was lost with its backups and there is no checkpoint",
    ),
    (
        RunStarted("demo-1", 80, 4, 2),
        "step 0  demo-1 started from the initial state: 4 workers in 2 stages, to step 80",
    ),
    (
        RunStarted("demo-1", 80, 1, 1, 40, "checkpoint"),
        "step 40  demo-1 started from the checkpoint of step 40: 1 worker in 1 stage, to step 80",
    ),
    (WorkerJoined(12, 5, 3, 4, 0.034), "step 12  worker 5 joined: 3 -> 4 workers in 0.03 s"),
    (WorkerLost(41, 3, "process died"), "step 41  worker 3 lost (process died)"),
    (
        WorkerLeft(12, 5, "spot notice", 4, 3, 0.034, 1.5),
        "step 12  worker 5 left (spot notice): 4 -> 3 workers in 0.03 s, 1.50 s after the notice; "
        "no work was lost",
    ),
    (DrainNotice(12, 5, "spot notice", 30.0), "step 12  worker 5 is to leave within 30 s (spot notice)"),
    (Resized(12, 2), "step 12  resized: to have 2 workers from now on"),
    (
        DemandCapped(0, 3, 4),
        "step 0  no more than 3 of 4 workers are asked for: more are not predicted to be faster",
    ),
    (DrainNotice(12, 5, "SIGTERM"), "step 12  worker 5 is to leave (SIGTERM)"),
    (
        Rebalanced(24, "worker 2 at 50% of the usual speed", 0.31, 0.02, 1_500_000),
        "step 24  work divided anew (worker 2 at 50% of the usual speed): 31% faster by prediction, "
        "in 0.02 s, 1.5 MB moved",
    ),
    (ControllerRestarted(33, 4, 3.21), "step 33  a new controller watches 4 workers after 3.21 s"),
    (
        Paused(41, 1, 2, (0, 3)),
        "step 41  paused: no answer from workers 0, 3, which hold the only copies of some of the state; "
        "state is kept",
    ),
    (Paused(41, 1, 2), "step 41  paused: 1 worker left, at least 2 needed; state is kept"),
    (Resumed(41, 2, 3.0), "step 41  resumed with 2 workers after 3.00 s"),
    (CheckpointWritten(40, 2_500_000, 0.2), "step 40  checkpoint written: 2.5 MB in 0.20 s"),
    (CheckpointSkipped("x is missing."), "checkpoint skipped: x is missing."),
    (RecordLost("no space left."), "no longer recorded: no space left."),
    (StepRepeated(7, 2), "step 7  repeated (try 2): a gradient outgrew its scale"),
    (FaultInjected(41, 3, "backward", "SIGKILL"), "step 41  fault injected: SIGKILL to worker 3 (backward)"),
    (FeedWorkerLost(41, 1, "process died"), "step 41  feed worker 1 lost (process died)"),
    (FeedWorkerReplaced(42, 1, 1.234), "step 42  feed worker 1 is back after 1.23 s"),
    (
        RunFinished("completed", 80, 3, 21.04, 0.913),
        "step 80  completed with 3 workers after 21.0 s, goodput 91.3%",
    ),
    (
        RunFinished("failed", 8, 1, 2.0, 0.5, "the loss is not finite"),
        "step 8  failed with 1 worker after 2.0 s, goodput 50.0%: the loss is not finite",
    ),
]


@pytest.mark.parametrize(("event", "text"), SENTENCES, ids=lambda value: type(value).__name__)
def test_sentence_and_round_trip(event: Event, text: str) -> None:
    assert sentence(event) == text
    assert from_json(json.loads(json.dumps(to_json(event)))) == event


def test_every_kind_is_covered_above() -> None:
    assert {type(event).__name__ for event, _ in SENTENCES} == set(KINDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "WorkerLots"}, "'WorkerLots' is no kind of event"),
        ({"kind": None}, "None is no kind of event"),
        ({"step": "soon"}, "WorkerLost: step: "),
        ({"colour": 1}, "WorkerLost: colour: "),
    ],
)
def test_a_record_that_is_no_event_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json({**to_json(WorkerLost(41, 3, "process died")), **change})


def test_a_missing_field_and_one_unknown_inside_are_errors() -> None:
    record = to_json(SENTENCES[0][0])
    del record["seconds"]["move"]
    with pytest.raises(ValueError, match=r"Recovered: seconds\.move: "):
        from_json(record)
    record["seconds"].update(move=0.0, wait=1.0)
    with pytest.raises(ValueError, match=r"Recovered: seconds\.wait: "):
        from_json(record)


@given(
    st.builds(
        StepRecord,
        loss=st.floats(allow_nan=False),
        grad_norm=st.floats(allow_nan=False),
        learning_rate=st.floats(allow_nan=False),
        seconds=st.floats(allow_nan=False),
        fingerprint=st.integers(0, 2**64 - 1),
        held_out_loss=st.none() | st.floats(allow_nan=False),
    )
)
def test_a_step_keeps_every_bit(record: StepRecord) -> None:
    written = step_to_json(record)
    assert isinstance(written["fingerprint"], str) and len(written["fingerprint"]) == 16
    read = step_from_json(json.loads(json.dumps(written)))
    for field in fields(StepRecord):
        value = getattr(record, field.name)
        assert repr(getattr(read, field.name)) == repr(value), field.name


def test_a_step_that_lacks_its_loss_is_an_error() -> None:
    record = step_to_json(StepRecord(1, 2.0, 1.0, 0.1, 8, 64, 0.2, 4, 0, 17))
    del record["loss"]
    with pytest.raises(ValueError, match="StepRecord: loss: "):
        step_from_json(record)
