"""What a worker did when, span by span: the raw material of the timeline."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from runtime.plan import WorkerId
from runtime.protocol import Timed

Kind = Literal[
    "forward",
    "backward",
    "wait",
    "data",
    "held_out",
    "reduce",
    "exchange",
    "optimizer",
    "gather",
    "backup",
    "recovery",
]
"""``wait``: for another stage's message. ``backward`` includes the loss. ``reduce``, ``exchange`` and
``gather`` include waiting for the others. ``backup``: waiting for the copies that this worker keeps.
``recovery``: from the interrupt, or from a planned change's boundary, until work goes on."""

KINDS: tuple[Kind, ...] = get_args(Kind)
FORWARD, BACKWARD, WAIT, DATA, HELD_OUT, REDUCE, EXCHANGE, OPTIMIZER, GATHER, BACKUP, RECOVERY = range(
    len(KINDS)
)

LIMIT = 4096
"""Spans of one step that are kept; the number of those left out is told."""

NO_MICRO_BATCH = -1

WORDS = 3
"""64-bit integers that a packed span takes: ``micro-batch << 8 | kind``, began, ended."""


class Span(NamedTuple):
    """``began`` and ``ended`` are nanoseconds of the worker's clock."""

    kind: Kind
    micro_batch: int
    began: int
    ended: int


class SpanLog:
    """The spans of the step under way; written by the worker's own thread alone.

    The clock is ``time.perf_counter_ns``, which all processes of one machine share on Linux; the offset to
    wall time that is told with them makes spans of several machines comparable as far as their clocks agree.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._flat = array("q", bytes(8 * WORDS * limit))
        self._end = WORDS * limit
        self._next = 0
        self._dropped = 0

    def add(self, kind: int, began: int, micro_batch: int = NO_MICRO_BATCH) -> None:
        """A span of ``KINDS[kind]`` from ``began`` until now."""
        ended = time.perf_counter_ns()
        at = self._next
        if at == self._end:
            self._dropped += 1
            return
        flat = self._flat
        flat[at] = micro_batch << 8 | kind
        flat[at + 1] = began
        flat[at + 2] = ended
        self._next = at + WORDS

    def take(self, worker: WorkerId, step: int, generation: int) -> Timed:
        """All spans since the last ``take``, as the message to the controller."""
        offset = time.time_ns() - time.perf_counter_ns()
        packed = self._flat[: self._next].tobytes()
        timed = Timed(worker, step, generation, offset, packed, self._dropped)
        self._next = self._dropped = 0
        return timed


def unpack(packed: bytes) -> Iterator[Span]:
    """The spans of a ``Timed`` message, in order of their ends."""
    flat = array("q")
    flat.frombytes(packed)
    for at in range(0, len(flat), WORDS):
        code = flat[at]
        yield Span(KINDS[code & 255], code >> 8, flat[at + 1], flat[at + 2])
