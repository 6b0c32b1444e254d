"""What a page or a terminal shows of a run's record: pure functions of the record and the time."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from jobs.watch.record import Happened, RunRecord, Step
from runtime.events import (
    CheckpointSkipped,
    CheckpointWritten,
    FaultInjected,
    FeedWorkerLost,
    Paused,
    RecordLost,
    Recovered,
    Resumed,
    RunFinished,
    RunStarted,
    WorkerLost,
)
from runtime.sentences import sentence
from runtime.spans import KINDS

POINTS = 1200
"""Points of a curve at most; of more steps, those with the least and the greatest values are shown."""

EVENTS = 500
"""Events that are listed, the newest."""

SILENT_SECONDS = 10.0
SILENT_STEPS = 10.0
"""A run of which nothing is heard for this long, in seconds and in steps, is said to be silent."""

RECENT_STEPS = 10
"""Steps that the present speed is a mean of."""


def state_of(record: RunRecord, now: float) -> tuple[str, str]:
    """(state, a sentence about it). States: starting, running, recovering, paused, silent, completed,
    interrupted, failed."""
    state, detail, since = "starting", "No worker has begun yet.", now
    for happened in record.events:
        match happened.event:
            case RunStarted():
                state, detail = "running", ""
            case RunFinished(outcome=outcome):
                state, detail = outcome, happened.event.detail
            case Paused():
                state, detail = "paused", sentence(happened.event)
            case WorkerLost(idle=False):
                state, detail = "recovering", sentence(happened.event)
            case Recovered() | Resumed():
                state, detail = "running", ""
        since = happened.time
    newest = _newest(record)
    if state == "running" and newest is not None:
        quiet = now - max(since, newest.committed_at)
        if quiet > max(SILENT_SECONDS, SILENT_STEPS * newest.seconds):
            since_step = f"Nothing new since step {newest.step}"
            return "silent", f"{since_step}: the run may have been ended from outside."
    return state, detail


def summary(record: RunRecord, now: float) -> dict[str, Any]:
    """The run in figures. Of a run that was resumed, ``started`` is when that was."""
    state, detail = state_of(record, now)
    begun = [each for each in record.events if isinstance(each.event, RunStarted)]
    newest = _newest(record)
    last = begun[-1] if begun else None
    over = state in ("completed", "interrupted", "failed")
    plan = record.plans.get(newest.generation) if newest else None
    recent = paces(list(record.steps.values())[-RECENT_STEPS:])
    lasted = sum(seconds for _, seconds in recent)
    books = record.books[-1] if record.books else None
    started = books.time - sum(books.seconds.values()) if books else None
    end = books.time if books and (over or state == "silent") else now
    return {
        "name": record.name,
        "state": state,
        "detail": detail,
        "over": over,
        "step": newest.step if newest else 0,
        "steps": last.event.steps if last and isinstance(last.event, RunStarted) else None,
        "loss": finite(newest.loss) if newest else None,
        "tokens_per_second": sum(step.tokens for step, _ in recent) / lasted if lasted else None,
        "step_seconds": lasted / len(recent) if recent else None,
        "workers": newest.workers if newest else 0,
        "stages": len(plan["stages"]) if plan else None,
        "generation": newest.generation if newest else 0,
        "goodput": books.goodput if books else None,
        "badput": dict(books.seconds) if books else {},
        "started": started,
        "elapsed": max(0.0, end - started) if started is not None else 0.0,
        "device": record.facts.get("device"),
        "unreadable": record.unreadable,
    }


def paces(steps: Sequence[Step]) -> list[tuple[Step, float]]:
    """Each step with the seconds from the commit before it to its own, all that came between included."""
    found, before = [], None
    for step in steps:
        passed = step.committed_at - before.committed_at if before else 0.0
        found.append((step, passed if passed > 0 else step.seconds))
        before = step
    return found


def _newest(record: RunRecord) -> Step | None:
    return next(reversed(record.steps.values()), None)


def current_plan(record: RunRecord) -> dict[str, Any] | None:
    """The plan of the newest step; before the first step the first plan."""
    newest = _newest(record)
    if newest is not None and newest.generation in record.plans:
        return record.plans[newest.generation]
    return record.plans[max(record.plans)] if record.plans else None


def charts(record: RunRecord) -> dict[str, Any]:
    """Curves, each ``{"x": [...], "y": [...]}``: by step, the goodput by seconds since the run began."""
    steps = [record.steps[step] for step in sorted(record.steps)]
    held_out = [step for step in steps if step.held_out is not None]
    origin = record.books[0].time - sum(record.books[0].seconds.values()) if record.books else 0.0
    return {
        "loss": _curve([(step.step, step.loss) for step in steps]),
        "held_out": _curve([(step.step, step.held_out) for step in held_out]),
        "throughput": _curve(
            [(step.step, step.tokens / passed if passed else None) for step, passed in paces(steps)]
        ),
        "goodput": _curve([(round(book.time - origin, 3), book.goodput) for book in record.books]),
    }


def _curve(points: Sequence[tuple[float, float | None]]) -> dict[str, list[float | None]]:
    shown = thinned([(x, finite(y)) for x, y in points])
    return {"x": [x for x, _ in shown], "y": [y for _, y in shown]}


def thinned(
    points: Sequence[tuple[float, float | None]], limit: int = POINTS
) -> list[tuple[float, float | None]]:
    """At most about ``limit`` of the points: the first, the last, and the least and the greatest of equal
    parts between. No value is invented, no peak hidden."""
    if len(points) <= limit:
        return list(points)
    part = len(points) / (limit // 2)
    kept = {0, len(points) - 1}
    for number in range(limit // 2):
        indices = range(int(number * part), int((number + 1) * part))
        known = [(value, index) for index in indices if (value := points[index][1]) is not None]
        kept.update({min(known)[1], max(known)[1]} if known else set(indices[:1]))
    return [points[index] for index in sorted(kept)]


def finite(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None


def events(record: RunRecord) -> list[dict[str, Any]]:
    """The newest events, oldest first: what happened, and the generations of the plans before and after."""
    steps = [record.steps[step] for step in sorted(record.steps)]
    first = max(0, len(record.events) - EVENTS)
    return [
        {"number": first + index, **_event(happened, steps, record)}
        for index, happened in enumerate(record.events[first:])
    ]


def _event(happened: Happened, steps: Sequence[Step], record: RunRecord) -> dict[str, Any]:
    event = happened.event
    text = sentence(event)
    step = getattr(event, "step", getattr(event, "version", None))
    if isinstance(event, RunStarted):
        step = event.from_version
    if step is not None:
        text = text.removeprefix(f"step {step}").strip()
    # steps that a loss took back were committed again, under the plan that followed
    since = event.from_version if isinstance(event, Recovered) else step
    before, after = (
        _generations(min(since, step - 1), step, steps, record) if step is not None else (None, None)
    )
    return {
        "time": happened.time,
        "kind": type(event).__name__,
        "step": step,
        "text": text,
        "tone": _tone(happened),
        "workers": _workers_of(happened),
        "before": before,
        "after": after,
    }


def _generations(
    version: int, step: int, steps: Sequence[Step], record: RunRecord
) -> tuple[int | None, int | None]:
    """The generations under which the steps up to ``version`` and those after ``step`` were committed."""
    at = bisect_right(steps, version, key=lambda each: each.step)
    before = steps[at - 1].generation if at else None
    at = bisect_right(steps, step, key=lambda each: each.step)
    after = steps[at].generation if at < len(steps) else (steps[-1].generation if steps else None)
    return (
        before if before in record.plans else None,
        after if after in record.plans else None,
    )


def _workers_of(happened: Happened) -> list[int]:
    event = happened.event
    lost = getattr(event, "lost", None)
    if lost is not None:
        return list(lost)
    worker = getattr(event, "worker", None)
    return [] if worker is None else [worker]


def _tone(happened: Happened) -> str:
    match happened.event:
        case (
            WorkerLost() | RecordLost() | CheckpointSkipped() | FaultInjected() | FeedWorkerLost() | Paused()
        ):
            return "bad"
        case RunFinished(outcome="failed"):
            return "bad"
        case Recovered() | Resumed():
            return "good"
        case CheckpointWritten():
            return "quiet"
    return "plain"


def newest_whole(record: RunRecord) -> dict[str, Any] | None:
    """The newest step that all its workers have told of."""
    for line in reversed(record.timeline):
        plan = record.plans.get(line["generation"])
        if plan and all(
            str(worker) in line["workers"] for stage in plan["stages"] for worker in stage["workers"]
        ):
            return line
    return record.timeline[-1] if record.timeline else None


def shares(line: dict[str, Any]) -> dict[int, dict[str, float]]:
    """For each worker of a step's timeline, the share of the step by kind; "idle" is what no span covers.

    The step lasts from its first span to its last one, of all workers.
    """
    workers = {int(worker): flat for worker, flat in line["workers"].items()}
    ends = [flat[at + 2] + flat[at + 3] for flat in workers.values() for at in range(0, len(flat), 4)]
    starts = [flat[at + 2] for flat in workers.values() for at in range(0, len(flat), 4)]
    whole = max(ends, default=0) - min(starts, default=0)
    table: dict[int, dict[str, float]] = {}
    for worker, flat in workers.items():
        taken: dict[str, float] = {}
        for at in range(0, len(flat), 4):
            kind = KINDS[flat[at]]
            taken[kind] = taken.get(kind, 0.0) + (flat[at + 3] / whole if whole else 0.0)
        table[worker] = {**taken, "idle": max(0.0, 1.0 - sum(taken.values()))}
    return table
