"""The sentence that a person reads of each event."""

from __future__ import annotations

from dataclasses import fields

from runtime.events import (
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
    Resized,
    Resumed,
    RunFinished,
    RunStarted,
    StepRepeated,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
)
from runtime.plan import WorkerId


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _names(workers: tuple[WorkerId, ...]) -> str:
    return f"{'worker' if len(workers) == 1 else 'workers'} {', '.join(map(str, workers))}"


def _lost(workers: tuple[WorkerId, ...], reason: str) -> str:
    return f"{_names(workers)} lost ({reason})"


def _recovered(event: Recovered) -> str:
    phases = ", ".join(
        f"{field.name} {getattr(event.seconds, field.name):.2f}" for field in fields(event.seconds)
    )
    what = _lost(event.lost, event.reason) if event.lost else event.reason
    text = (
        f"step {event.step}  {what}: {event.workers_before} -> {event.workers_after} workers, "
        f"recovered in {event.seconds.total:.2f} s ({phases})"
    )
    if event.kept:
        text += f", {event.kept:.0%} of the step kept"
    if event.source == "checkpoint":
        text += f" from the checkpoint of step {event.from_version}: newer state was lost with its backups"
    elif event.source == "initial":
        text += " from the initial state: newer state was lost with its backups and there is no checkpoint"
    return text


def sentence(event: Event) -> str:
    """One line for the terminal."""
    match event:
        case RunStarted():
            origin = {
                "initial": "from the initial state",
                "checkpoint": f"from the checkpoint of step {event.from_version}",
                "peers": f"from step {event.from_version}",
            }[event.source]
            return (
                f"step {event.from_version}  {event.run} started {origin}: {_count(event.workers, 'worker')} "
                f"in {_count(event.stages, 'stage')}, to step {event.steps}"
            )
        case WorkerJoined():
            return (
                f"step {event.step}  worker {event.worker} joined: {event.workers_before} -> "
                f"{event.workers_after} workers in {event.seconds:.2f} s"
            )
        case WorkerLost():
            return f"step {event.step}  {_lost((event.worker,), event.reason)}"
        case Recovered():
            return _recovered(event)
        case WorkerLeft():
            return (
                f"step {event.step}  worker {event.worker} left ({event.reason}): {event.workers_before} -> "
                f"{event.workers_after} workers in {event.seconds:.2f} s, {event.notice_seconds:.2f} s after "
                "the notice; no work was lost"
            )
        case DrainNotice():
            within = "" if event.deadline is None else f" within {event.deadline:.0f} s"
            return f"step {event.step}  worker {event.worker} is to leave{within} ({event.reason})"
        case Resized():
            return f"step {event.step}  resized: to have {_count(event.workers, 'worker')} from now on"
        case DemandCapped():
            return (
                f"step {event.step}  no more than {event.workers} of {_count(event.most, 'worker')} are "
                "asked for: more are not predicted to be faster"
            )
        case Rebalanced():
            gain = f"{event.gain:.0%} faster by prediction, " if event.gain else ""
            return (
                f"step {event.step}  work divided anew ({event.reason}): {gain}"
                f"in {event.seconds:.2f} s, {event.moved_bytes / 1e6:.1f} MB moved"
            )
        case ControllerRestarted():
            workers = _count(event.workers, "worker")
            return f"step {event.step}  a new controller watches {workers} after {event.seconds:.2f} s"
        case Paused() if event.cut_off:
            return (
                f"step {event.step}  paused: no answer from {_names(event.cut_off)}, which hold the only "
                "copies of some of the state; state is kept"
            )
        case Paused():
            return (
                f"step {event.step}  paused: {_count(event.workers, 'worker')} left, "
                f"at least {event.min_workers} needed; state is kept"
            )
        case Resumed():
            workers = _count(event.workers, "worker")
            return f"step {event.step}  resumed with {workers} after {event.seconds:.2f} s"
        case CheckpointWritten():
            megabytes = event.bytes / 1e6
            return f"step {event.version}  checkpoint written: {megabytes:.1f} MB in {event.seconds:.2f} s"
        case CheckpointSkipped():
            return f"checkpoint skipped: {event.problem}"
        case RecordLost():
            return f"no longer recorded: {event.problem}"
        case StepRepeated():
            return f"step {event.step}  repeated (try {event.attempt}): a gradient outgrew its scale"
        case FaultInjected():
            return f"step {event.step}  fault injected: {event.signal} to worker {event.worker} ({event.at})"
        case FeedWorkerLost():
            return f"step {event.step}  feed worker {event.feed_worker} lost ({event.reason})"
        case FeedWorkerReplaced():
            return f"step {event.step}  feed worker {event.feed_worker} is back after {event.seconds:.2f} s"
        case RunFinished():
            text = (
                f"step {event.step}  {event.outcome} with {_count(event.workers, 'worker')} after "
                f"{event.seconds:.1f} s, goodput {event.goodput:.1%}"
            )
            return f"{text}: {event.detail}" if event.detail else text
