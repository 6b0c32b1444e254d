"""A run's timeline in the Trace Event Format, which Perfetto and chrome://tracing open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.watch.record import RunRecord
from jobs.watch.source import Source
from jobs.watch.view import events, finite
from runtime.spans import KINDS

CONTROLLER_PID, WORKERS_PID = 1, 2
"""The format groups rows by "process"; a worker is a row ("thread") of the second one."""


def trace_events(record: RunRecord) -> list[dict[str, Any]]:
    """Complete events ("X") for steps and what is nested in them, instant events ("i") for what happened,
    counters ("C") for the loss, and metadata ("M") that names the rows.

    ``ts`` and ``dur`` are microseconds, ``ts`` since the first span or event. Source: "Trace Event Format",
    Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
    """
    happened = events(record)
    times = [each["began"] for each in record.timeline] + [each["time"] for each in happened]
    origin = min(times, default=0.0)
    workers = sorted({int(worker) for line in record.timeline for worker in line["workers"]})
    made = [
        _name("process_name", CONTROLLER_PID, 0, f"run {record.name}"),
        _name("thread_name", CONTROLLER_PID, 0, "events"),
        _name("process_name", WORKERS_PID, 0, "workers"),
    ]
    for worker in workers:
        made.append(_name("thread_name", WORKERS_PID, worker, f"worker {worker}"))
        made.append({**_name("thread_sort_index", WORKERS_PID, worker, ""), "args": {"sort_index": worker}})
    for line in record.timeline:
        base = (line["began"] - origin) * 1e6
        for worker, flat in line["workers"].items():
            made += _spans(line, int(worker), flat, base)
    for each in happened:
        made.append(
            {
                "name": f"{each['kind']}: {each['text']}",
                "cat": "event",
                "ph": "i",
                "s": "g",
                "ts": (each["time"] - origin) * 1e6,
                "pid": CONTROLLER_PID,
                "tid": 0,
                "args": {"step": each["step"]},
            }
        )
    told = {line["step"] for line in record.timeline}
    for step in record.steps.values():
        if step.step in told and finite(step.loss) is not None:
            ts = max(0.0, (step.committed_at - origin) * 1e6)
            made.append(
                {"name": "loss", "ph": "C", "ts": ts, "pid": CONTROLLER_PID, "args": {"loss": step.loss}}
            )
    return made


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": {"name": name}}


def _spans(line: dict[str, Any], worker: int, flat: list[int], base: float) -> list[dict[str, Any]]:
    if not flat:
        return []
    row = {"ph": "X", "pid": WORKERS_PID, "tid": worker}
    began = min(flat[2::4])
    ended = max(start + duration for start, duration in zip(flat[2::4], flat[3::4], strict=True))
    made: list[dict[str, Any]] = [
        {
            "name": f"step {line['step']}",
            "cat": "step",
            **row,
            "ts": base + began,
            "dur": ended - began,
            "args": {"step": line["step"], "generation": line["generation"]},
        }
    ]
    for at in range(0, len(flat), 4):
        kind, micro_batch, start, duration = flat[at : at + 4]
        arguments = {"step": line["step"]} | ({"micro_batch": micro_batch} if micro_batch >= 0 else {})
        made.append(
            {
                "name": KINDS[kind] if micro_batch < 0 else f"{KINDS[kind]} {micro_batch}",
                "cat": KINDS[kind],
                **row,
                "ts": base + start,
                "dur": duration,
                "args": arguments,
            }
        )
    return made


def write_trace(source: Source, path: Path) -> int:
    """Writes the trace; returns the number of its spans. Raises ValueError for a run without a timeline."""
    record = RunRecord(source)
    record.follow()
    if not record.timeline:
        raise ValueError(f"{record.name} has no timeline yet: it is there once a step has been committed")
    made = trace_events(record)
    text = json.dumps({"traceEvents": made, "displayTimeUnit": "ms", "otherData": {"run": record.name}})
    path.write_text(text, encoding="utf-8")
    return sum(each["ph"] == "X" for each in made)
