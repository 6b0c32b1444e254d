"""Spans of a step: what is put in comes out, in little room, and never more than the limit."""

from __future__ import annotations

import time

from runtime.fabric import notes
from runtime.spans import BACKWARD, FORWARD, KINDS, NO_MICRO_BATCH, WAIT, SpanLog, unpack


def test_what_goes_in_comes_out_once() -> None:
    log = SpanLog()
    before = time.perf_counter_ns()
    log.add(FORWARD, before, 300)
    log.add(WAIT, before + 1)
    told = log.take(7, 12, 3)
    after = time.perf_counter_ns()
    assert (told.worker, told.step, told.generation, told.dropped) == (7, 12, 3, 0)
    forward, wait = unpack(told.spans)
    assert (forward.kind, forward.micro_batch, forward.began) == ("forward", 300, before)
    assert (wait.kind, wait.micro_batch, wait.began) == ("wait", NO_MICRO_BATCH, before + 1)
    assert before <= forward.ended <= wait.ended <= after
    assert list(unpack(log.take(7, 13, 3).spans)) == []


def test_offset_leads_to_wall_time() -> None:
    earliest = time.time_ns()
    log = SpanLog()
    log.add(BACKWARD, time.perf_counter_ns())
    told = log.take(0, 1, 1)
    (span,) = unpack(told.spans)
    assert earliest - 10**7 < span.began + told.offset < time.time_ns() + 10**7


def test_no_more_than_the_limit_and_the_rest_is_told() -> None:
    log = SpanLog(limit=3)
    for micro_batch in range(5):
        log.add(FORWARD, 1, micro_batch)
    told = log.take(0, 1, 1)
    assert [span.micro_batch for span in unpack(told.spans)] == [0, 1, 2]
    assert told.dropped == 2
    log.add(FORWARD, 1, 9)
    assert log.take(0, 2, 1).dropped == 0


def test_every_kind_has_its_number() -> None:
    log = SpanLog()
    for number in range(len(KINDS)):
        log.add(number, 0, number)
    assert [(span.kind, span.micro_batch) for span in unpack(log.take(0, 1, 1).spans)] == [
        (kind, number) for number, kind in enumerate(KINDS)
    ]


def test_it_travels_as_a_note() -> None:
    log = SpanLog()
    log.add(WAIT, 5)
    told = log.take(0, 1, 1)
    assert notes.loads(notes.dumps(told)) == told
