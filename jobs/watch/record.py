"""What is on record of a run, read as it grows: only what is new is read and parsed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.watch.source import Source
from runtime.events import Event, from_json

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """What is shown of a step; times in seconds, ``committed_at`` since 1970."""

    step: int
    loss: float
    held_out: float | None
    tokens: int
    seconds: float
    workers: int
    generation: int
    committed_at: float


@dataclass(frozen=True, slots=True)
class Books:
    """The goodput so far and the seconds by cause, at ``time`` (since 1970)."""

    time: float
    goodput: float
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Happened:
    """An event and when (seconds since 1970)."""

    time: float
    event: Event


class Tail:
    """The whole lines of a file that only grows; ``take`` gets each of them once, in order.

    A last line without an end is waited for. If the file has become shorter than what was read, it is
    another one: ``reset`` is called and everything is read again.
    """

    def __init__(
        self, source: Source, name: str, take: Callable[[Line], None], reset: Callable[[], None]
    ) -> None:
        self._source, self._name, self._take, self._reset = source, name, take, reset
        self._offset = 0

    def follow(self) -> bool:
        """Takes what is new; whether there was anything."""
        before = self._offset
        while True:
            piece = self._source.piece(self._name, self._offset)
            if piece is None:
                if self._offset == 0:
                    return False
                self._offset = 0
                self._reset()
                continue
            whole = piece[: piece.rfind(b"\n") + 1]
            if not whole:
                return self._offset != before
            for line in whole.splitlines():
                self._take(_parsed(line))
            self._offset += len(whole)


def _parsed(line: bytes) -> Line:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


class RunRecord:
    """Everything that is shown of a run; ``follow`` brings it up to date.

    A line that this version cannot read is left out and counted in ``unreadable``: a page must show what
    there is. ``version`` grows with whatever is new.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.steps: dict[int, Step] = {}
        self.events: list[Happened] = []
        self.plans: dict[int, Line] = {}
        self.books: list[Books] = []
        self.timeline: list[Line] = []
        self.facts: Line = {}
        self.unreadable = 0
        self.version = 0
        self.timeline_version = 0
        self._source = source
        self._timeline_bytes = b""
        self._tails = (
            Tail(source, "events.jsonl", self._guarded(self._event), self.events.clear),
            Tail(source, "steps.jsonl", self._guarded(self._step), self.steps.clear),
            Tail(source, "plans.jsonl", self._guarded(self._plan), self.plans.clear),
            Tail(source, "goodput.jsonl", self._guarded(self._book), self.books.clear),
        )

    def follow(self) -> None:
        """Raises OSError where the run cannot be reached."""
        if not self.facts:
            self.facts = _parsed(self._source.piece("run.json", 0) or b"")
        grown = [tail.follow() for tail in self._tails]
        if self._follow_timeline() or any(grown):
            self.version += 1

    def _follow_timeline(self) -> bool:
        pieces: list[bytes] = []
        while piece := self._source.piece("timeline.jsonl", sum(map(len, pieces))):
            pieces.append(piece)
        content = b"".join(pieces)
        if content == self._timeline_bytes:
            return False
        lines = [_parsed(line) for line in content.splitlines()]
        if not all(lines):
            return False  # replaced while its pieces were read
        self._timeline_bytes, self.timeline = content, lines
        self.timeline_version += 1
        return True

    def _guarded(self, take: Callable[[Line], None]) -> Callable[[Line], None]:
        def guarded(line: Line) -> None:
            try:
                take(line)
            except (ValueError, KeyError, TypeError):
                self.unreadable += 1

        return guarded

    def _event(self, line: Line) -> None:
        time = float(line.pop("time"))
        self.events.append(Happened(time, from_json(line)))

    def _step(self, line: Line) -> None:
        if "superseded_from" in line:
            first = int(line["superseded_from"])
            for number in [number for number in self.steps if number >= first]:
                del self.steps[number]
            return
        held_out = line.get("held_out_loss")
        step = Step(
            step=int(line["step"]),
            loss=float(line["loss"]),
            held_out=None if held_out is None else float(held_out),
            tokens=int(line["tokens"]),
            seconds=float(line["seconds"]),
            workers=int(line["workers"]),
            generation=int(line["generation"]),
            committed_at=float(line["committed_at"]),
        )
        self.steps.pop(step.step, None)  # so that the newest is the last
        self.steps[step.step] = step

    def _plan(self, line: Line) -> None:
        self.plans[int(line["generation"])] = line

    def _book(self, line: Line) -> None:
        self.books.append(Books(float(line["time"]), float(line["goodput"]), dict(line["seconds"])))
