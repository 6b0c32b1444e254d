"""A run folder made up for tests of what shows a run: as many workers as wanted, with a loss and a join."""

from __future__ import annotations

import math
import time
from array import array
from pathlib import Path

from runtime.events import (
    CheckpointWritten,
    Event,
    Recovered,
    RecoverySeconds,
    RunFinished,
    RunStarted,
    StepRecord,
    WorkerJoined,
    WorkerLost,
)
from runtime.goodput import Ledger
from runtime.plan import Plan, Shard, Stage
from runtime.protocol import Timed
from runtime.run_folder import RunFolder
from runtime.spans import (
    BACKUP,
    BACKWARD,
    EXCHANGE,
    FORWARD,
    GATHER,
    KINDS,
    OPTIMIZER,
    RECOVERY,
    REDUCE,
    WAIT,
    WORDS,
)
from runtime.timeline import Timeline

STEPS, LOST_AT, JOINED_AT = 60, 31, 45
MILLISECOND = 1_000_000


def made_plan(generation: int, workers: tuple[int, ...], stages: int, micro_batches: int) -> Plan:
    """Equal stages of three layers each, dealt in turn."""
    groups = [workers[k::stages] for k in range(stages)]
    size = 6400
    shards = []
    for block in range(3 * stages):
        group = groups[block // 3]
        part = size // len(group)
        for index, owner in enumerate(group):
            backup = group[(index + 1) % len(group)]
            shards.append(Shard(block, index * part, (index + 1) * part, owner, backup))
    return Plan(
        generation,
        tuple(Stage(3 * k, 3 * k + 3, group) for k, group in enumerate(groups)),
        tuple(tuple(group[m % len(group)] for m in range(micro_batches)) for group in groups),
        tuple(shards),
    )


def packed(spans: list[tuple[int, int, int, int]]) -> bytes:
    """(kind, micro-batch, began, ended) as ``runtime.spans`` packs them."""
    flat = array("q")
    for kind, micro_batch, began, ended in spans:
        flat.extend((micro_batch << 8 | kind, began, ended))
    assert len(flat) == WORDS * len(spans) and all(kind < len(KINDS) for kind, *_ in spans)
    return flat.tobytes()


def step_spans(plan: Plan, worker: int, began: int, recovers: bool) -> list[tuple[int, int, int, int]]:
    """A plain pipeline without overlap: forwards, a wait, backwards, and the rounds at the end."""
    stage, spans, now = plan.stage_of(worker), [], began

    def add(kind: int, milliseconds: float, micro_batch: int = -1) -> None:
        nonlocal now
        ended = now + round(milliseconds * MILLISECOND)
        spans.append((kind, micro_batch, now, ended))
        now = ended

    if recovers:
        add(FORWARD, 3, 0)
        add(WAIT, 6)
        add(RECOVERY, 40)
    if stage:
        add(WAIT, 4 * stage)
    mine = plan.micro_batches_of(worker)
    for micro_batch in mine:
        add(FORWARD, 4, micro_batch)
    add(WAIT, 4 + 6 * (len(plan.stages) - 1 - stage))
    for micro_batch in mine:
        add(BACKWARD, 8 + worker % 3, micro_batch)
    for kind, milliseconds in ((REDUCE, 3), (BACKUP, 1), (EXCHANGE, 2), (OPTIMIZER, 4), (GATHER, 2)):
        add(kind, milliseconds)
    return spans


def make_run(
    path: Path,
    workers: int = 6,
    stages: int = 2,
    micro_batches: int = 12,
    *,
    steps: int = STEPS,
    finished: bool = True,
    name: str = "made",
) -> RunFolder:
    """Writes the folder by the functions that a controller writes it by."""
    folder = RunFolder.create(path / name, "", {"device": "cpu", "versions": {}})
    begun = time.time() - 100.0
    everybody = tuple(range(workers))
    lost = workers - 1
    left = tuple(worker for worker in everybody if worker != lost)
    plans = [
        made_plan(1, everybody, stages, micro_batches),
        made_plan(2, left, stages, micro_batches),
        made_plan(3, (*left, workers), stages, micro_batches),
    ]
    timeline, ledger, now = Timeline(), Ledger.begin(round((begun - 3.0) * 1e9)), begun
    ledger = ledger.enter(round(begun * 1e9), "productive")

    def note(event: Event, **more: float) -> None:
        folder.log_event(event, more.get("at", now))

    folder.log_plan(plans[0], now)
    note(RunStarted(folder.name, STEPS, workers, stages))
    for step in range(1, steps + 1):
        plan = plans[0 if step < LOST_AT else 1 if step < JOINED_AT else 2]
        recovers = step == LOST_AT
        if recovers:
            folder.log_plan(plan, now)
            note(WorkerLost(step, lost, "process died"), at=now + 0.009)
            timeline.mark(step)
        if step == JOINED_AT:
            folder.log_plan(plan, now)
            note(WorkerJoined(step - 1, workers, len(left), workers, 0.01))
            timeline.mark(step)
        base = round(now * 1e9)
        ends = []
        for worker in plan.workers:
            spans = step_spans(plan, worker, 0, recovers)
            ends.append(spans[-1][3])
            timeline.take(Timed(worker, step, plan.generation, base, packed(spans)))
        if recovers:
            phases = RecoverySeconds(0.006, 0.01, 0.002, 0.018, 0.01)
            event = Recovered(
                step, (lost,), "process died", workers, len(left), phases, "peers", 30, 9000, 0.4
            )
            note(event, at=now + 0.049)
        now += max(ends) / 1e9 + 0.001
        ledger = ledger.commit(round(now * 1e9))
        folder.log_step(
            StepRecord(
                step=step,
                loss=2.0 + 3.0 * math.exp(-step / 15) + 0.05 * math.sin(step * 1.7),
                grad_norm=1.0,
                learning_rate=1e-3,
                samples=micro_batches,
                tokens=512 * micro_batches,
                seconds=max(ends) / 1e9,
                workers=len(plan.workers),
                generation=plan.generation,
                fingerprint=step,
                held_out_loss=2.1 + 3.0 * math.exp(-step / 15) if step % 20 == 0 else None,
                committed_at=now,
            )
        )
        if step == 20:
            note(CheckpointWritten(step, 9_000_000, 0.01))
        if step % 5 == 0:
            folder.log_books(ledger, now)
    if finished:
        note(RunFinished("completed", steps, workers, now - begun, 0.9))
    folder.log_books(ledger, now)
    folder.write_timeline(timeline.text())
    folder.close()
    return folder
