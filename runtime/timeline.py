"""The timeline that the controller keeps: the last steps of all workers, and those around each event."""

from __future__ import annotations

import json
from collections.abc import Iterable
from threading import Lock
from typing import Any

import numpy as np

from runtime.protocol import Timed
from runtime.spans import WORDS

LAST = 32
"""Steps that are kept whatever happens, as long as they have no more than ``LAST_SPANS`` spans."""

LAST_SPANS = 24_000
AROUND_SPANS = 48_000
"""Spans of the steps around events that are kept; the oldest go first."""

BEFORE, AFTER = 1, 2
"""How many steps before and after that of an event are kept."""

MARKS = 256
"""Events whose steps are kept."""


class _Step:
    """What the workers told of one step; ``text`` is its line, once it was asked for."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.told: dict[int, Timed] = {}
        self.read: dict[str, Any] | None = None
        self.text: str | None = None
        self.spans = 0

    def take(self, timed: Timed) -> None:
        before = self.told.get(timed.worker)
        self.spans += (len(timed.spans) - (len(before.spans) if before else 0)) // (8 * WORDS)
        self.told[timed.worker] = timed
        self.read = self.text = None

    def line(self) -> str:
        if self.text is None:
            record = self._record() if self.read is None else self.read
            self.text = json.dumps(record, separators=(",", ":"))
        return self.text

    def _record(self) -> dict[str, Any]:
        spans_N3 = {
            worker: np.frombuffer(timed.spans, dtype=np.int64).reshape(-1, WORDS)
            for worker, timed in sorted(self.told.items())
        }
        starts = [int(each[:, 1].min()) + self.told[w].offset for w, each in spans_N3.items() if len(each)]
        began = min(starts, default=0)
        workers = {}
        for worker, each_N3 in spans_N3.items():
            rows_N4 = np.empty((len(each_N3), 4), dtype=np.int64)
            rows_N4[:, 0] = each_N3[:, 0] & 255
            rows_N4[:, 1] = each_N3[:, 0] >> 8
            rows_N4[:, 2] = (each_N3[:, 1] + (self.told[worker].offset - began)) // 1000
            rows_N4[:, 3] = (each_N3[:, 2] - each_N3[:, 1]) // 1000
            workers[str(worker)] = rows_N4[np.argsort(rows_N4[:, 2], kind="stable")].ravel().tolist()
        return {
            "step": self.step,
            "generation": max((timed.generation for timed in self.told.values()), default=0),
            "began": began / 1e9,
            "dropped": sum(timed.dropped for timed in self.told.values()),
            "workers": workers,
        }


class Timeline:
    """Thread-safe. Bounded by the limits above, whatever the number of workers and steps.

    A line of the record is ``{"step", "generation", "began": seconds since 1970, "dropped": spans that were
    left out, "workers": {worker: [kind, micro-batch, start, duration, ...]}}``: four numbers a span, ``kind``
    an index into ``runtime.spans.KINDS``, times in microseconds after ``began``.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._steps: dict[int, _Step] = {}
        self._marked: list[int] = []
        self._newest = 0
        self.changes = 0
        """Grows with whatever is taken in."""

    def restore(self, records: Iterable[dict[str, Any]]) -> None:
        """Takes up what an earlier controller of the run has recorded; such steps stay as those around an
        event do."""
        with self._lock:
            for record in records:
                step = _Step(int(record["step"]))
                step.read = record
                step.spans = sum(len(flat) // 4 for flat in record["workers"].values())
                self._steps[step.step] = step
                self._mark(step.step)

    def take(self, timed: Timed) -> None:
        """What one worker did in a step. A step that is done again replaces what was told of it before."""
        with self._lock:
            step = self._steps.get(timed.step)
            if step is None or step.read is not None:
                step = self._steps[timed.step] = _Step(timed.step)
            step.take(timed)
            self._newest = timed.step
            self.changes += 1
            if len(self._steps) > 2 * LAST:
                self._forget()

    def mark(self, step: int) -> None:
        """Something happened in ``step``: those around it are kept."""
        with self._lock:
            self._mark(step)
            self.changes += 1

    def _mark(self, step: int) -> None:
        if step not in self._marked:
            self._marked = [*self._marked, step][-MARKS:]

    def text(self) -> str:
        """The record: a line of JSON a step, ascending."""
        with self._lock:
            self._forget()
            steps = [self._steps[step] for step in sorted(self._steps)]
        lines = []
        for step in steps:
            with self._lock:  # not for all of them: workers' messages wait meanwhile
                lines.append(step.line() + "\n")
        return "".join(lines)

    def _forget(self) -> None:
        """Lets go of what is over the limits."""
        room = LAST_SPANS
        last: set[int] = set()
        for step in sorted((step for step in self._steps if step <= self._newest), reverse=True)[:LAST]:
            room -= self._steps[step].spans
            if room < 0 and last:
                break
            last.add(step)
        room = AROUND_SPANS
        around: set[int] = set()
        for mark in reversed(self._marked):
            steps = set(range(mark - BEFORE, mark + AFTER + 1)) & self._steps.keys() - around
            room -= sum(self._steps[step].spans for step in steps)
            if room < 0:
                break
            around.update(steps)
        self._steps = {step: kept for step, kept in self._steps.items() if step in last | around}
