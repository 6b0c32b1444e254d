"""Traces of what befalls a cluster's machines: read from a table, or drawn from a random process.

A trace is a CSV file with the columns ``time_s``, ``event`` and ``node``. ``time_s`` counts seconds from the
start. ``event`` is one of

- ``notice``: the node will be taken away; it is told so ``NOTICE_SECONDS`` before,
- ``lost``: the node is gone, with everything on it,
- ``back``: the node, or another one in its place, can be had again.

``node`` is a number from 0 up to but not including 1: a place in the list of nodes, so that one trace fits
clusters of any size. Lines that begin with ``#`` are comments.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, get_args

Event = Literal["notice", "lost", "back"]

NOTICE_SECONDS = 30.0
COLUMNS = ("time_s", "event", "node")


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One row; see above."""

    time: float
    event: Event
    node: float


def read_trace(path: Path) -> list[Entry]:
    """The rows of a trace, in order of time.

    Raises ValueError that names file, line and remedy where the file is none, and FileNotFoundError.
    """
    entries = []
    with path.open(newline="") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip() and line[0] != "#"]
    rows = csv.reader(line for _, line in lines)
    for (number, _), row in zip(lines, rows, strict=True):
        if number == lines[0][0]:
            if tuple(row) != COLUMNS:
                raise ValueError(f"{path}, line {number}: begin the table with {','.join(COLUMNS)}")
            continue
        entries.append(_entry(path, number, row))
    if not lines:
        raise ValueError(f"{path} is empty: begin the table with {','.join(COLUMNS)}")
    return sorted(entries)


def _entry(path: Path, number: int, row: list[str]) -> Entry:
    place = f"{path}, line {number}"
    if len(row) != len(COLUMNS):
        raise ValueError(f"{place}: {len(row)} values; give {len(COLUMNS)}: {', '.join(COLUMNS)}")
    event = next((event for event in get_args(Event) if event == row[1]), None)
    if event is None:
        raise ValueError(f"{place}: {row[1]!r} is no event; use one of {', '.join(get_args(Event))}")
    try:
        time, node = float(row[0]), float(row[2])
    except ValueError:
        raise ValueError(f"{place}: time_s and node must be numbers") from None
    if not (0.0 <= time < float("inf") and 0.0 <= node < 1.0):
        raise ValueError(
            f"{place}: time_s must not be negative, and node lies between 0 and 1 (not included)"
        )
    return Entry(time, event, node)


def spot_trace(
    seconds: float, losses_per_hour: float, seed: int, *, noticed: float = 0.5, away_seconds: float = 300.0
) -> list[Entry]:
    """Losses as a Poisson process, of which the share ``noticed`` is announced; capacity comes back after an
    exponential time of ``away_seconds`` in the mean. One loss in ten takes three nodes at once."""
    random = Random(seed)
    entries: list[Entry] = []
    time = 0.0
    while True:
        time += random.expovariate(losses_per_hour / 3600.0)
        if time >= seconds:
            return sorted(entry for entry in entries if entry.time < seconds)
        for _ in range(3 if random.random() < 0.1 else 1):
            node = round(random.random(), 4) % 1.0
            if random.random() < noticed and time > NOTICE_SECONDS:
                entries.append(Entry(round(time - NOTICE_SECONDS, 1), "notice", node))
            entries.append(Entry(round(time, 1), "lost", node))
            back = time + random.expovariate(1.0 / away_seconds)
            entries.append(Entry(round(back, 1), "back", node))


def rows(entries: Iterable[Entry]) -> Iterator[str]:
    """The lines of a trace's table."""
    yield ",".join(COLUMNS)
    for entry in entries:
        yield f"{entry.time},{entry.event},{entry.node}"
