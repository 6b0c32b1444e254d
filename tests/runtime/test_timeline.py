"""The controller's timeline: the last steps, those around events, and never more than its limits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime import timeline as module
from runtime.protocol import Timed
from runtime.spans import FORWARD, RECOVERY
from runtime.timeline import LAST, Timeline
from tests.support.made_run import packed


def told(step: int, worker: int = 0, *, generation: int = 1, offset: int = 0, count: int = 1) -> Timed:
    spans = packed([(FORWARD, m, 1_000_000 * step, 1_000_000 * step + 5_000) for m in range(count)])
    return Timed(worker, step, generation, offset, spans)


def read(timeline: Timeline) -> list[dict[str, Any]]:
    return [json.loads(line) for line in timeline.text().splitlines()]


def steps(timeline: Timeline) -> list[int]:
    return [line["step"] for line in read(timeline)]


def test_a_line_has_all_workers_on_one_clock() -> None:
    timeline = Timeline()
    begun = 1_795_000_000 * 10**9
    first = packed([(RECOVERY, -1, 2_000_000, 3_000_000), (FORWARD, 4, 1_000_000, 1_500_000)])
    timeline.take(Timed(3, 8, 2, begun, first, dropped=2))
    timeline.take(Timed(1, 8, 2, begun + 1_000_000, packed([(FORWARD, 5, 1_000_000, 1_000_999)])))
    (line,) = read(timeline)
    assert line == {
        "step": 8,
        "generation": 2,
        "began": pytest.approx(1_795_000_000.001, abs=1e-6),
        "dropped": 2,
        "workers": {"1": [FORWARD, 5, 1000, 0], "3": [FORWARD, 4, 0, 500, RECOVERY, -1, 1000, 1000]},
    }


def test_the_last_steps_stay_and_those_around_an_event() -> None:
    timeline = Timeline()
    for step in range(1, 200):
        timeline.take(told(step))
        if step == 50:
            timeline.mark(50)
    assert steps(timeline) == [49, 50, 51, 52, *range(200 - LAST, 200)]


def test_an_event_of_a_step_that_is_still_to_be_committed() -> None:
    timeline = Timeline()
    timeline.take(told(30))
    timeline.mark(31)
    for step in range(31, 200):
        timeline.take(told(step))
    assert steps(timeline)[:4] == [30, 31, 32, 33]


def test_a_step_done_again_replaces_what_was_told_before() -> None:
    timeline = Timeline()
    for step in (1, 2, 3):
        timeline.take(told(step))
    timeline.take(told(2, generation=2, count=3))
    assert [(line["step"], line["generation"]) for line in read(timeline)] == [(1, 1), (2, 2)]
    assert len(read(timeline)[1]["workers"]["0"]) == 12


def test_limits_of_spans_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_SPANS", 50)
    monkeypatch.setattr(module, "AROUND_SPANS", 100)
    timeline = Timeline()
    for step in range(1, 101):
        timeline.mark(step)
        for worker in range(4):
            timeline.take(told(step, worker, count=5))
    kept = read(timeline)
    spans = sum(len(flat) // 4 for line in kept for flat in line["workers"].values())
    assert kept[-1]["step"] == 100
    assert spans <= 50 + 100


def test_the_newest_step_is_kept_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_SPANS", 10)
    timeline = Timeline()
    timeline.take(told(1))
    timeline.take(told(2, count=99))
    assert steps(timeline) == [2]


def test_another_controller_goes_on_with_the_record() -> None:
    first = Timeline()
    for step in range(1, 6):
        first.take(told(step))
    before = read(first)
    second = Timeline()
    second.restore(before)
    assert read(second) == before
    for step in range(4, 120):
        second.take(told(step, generation=2))
    by_step = {line["step"]: line["generation"] for line in read(second)}
    assert (by_step[3], by_step[4]) == (1, 2), "what is told anew takes the place of what was recorded"
    assert set(by_step) > {1, 2, 3}
