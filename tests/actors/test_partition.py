"""Links that are cut for real: one side goes on with the same bits, the other one stops, and no step is
committed twice."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from runtime.detection import Patience
from runtime.events import Event, Recovered
from runtime.plan import CONTROLLER, WorkerId
from tests.support.chaos import Trigger, TriggeringTokens, losses, recoveries
from tests.support.cluster import Result, toy_job
from tests.support.expected import toy_bits
from tests.support.ray_jobs import wait_until
from tests.support.wires import Way, WiredRun

STEPS = 12
CUT_AT = 4
PATIENCE = Patience(silence_seconds=1.0, stuck_seconds=5.0, dispute_seconds=0.2)


def between(one: Iterable[WorkerId], other: Iterable[WorkerId]) -> list[Way]:
    return list(product(one, other))


def both(one: Iterable[WorkerId], other: Iterable[WorkerId]) -> list[Way]:
    one, other = tuple(one), tuple(other)
    return between(one, other) + between(other, one)


class MendingRun(WiredRun):
    """Mends the wires when the others have recovered: what was held back is delivered then."""

    def __post_init__(self) -> None:
        self.observe = self._mend
        super().__post_init__()

    def _mend(self, event: Event) -> None:
        if isinstance(event, Recovered):
            threading.Thread(target=self.wires.mend, daemon=True).start()


def run_cut(
    folder: Path, ways: Collection[Way], *, unreachable: Collection[WorkerId] = (), **changes: Any
) -> tuple[WiredRun, Result]:
    """Cuts ``ways`` while step ``CUT_AT`` is under way."""
    trigger = Trigger(CUT_AT, 2)
    job = toy_job(folder, build_data=partial(TriggeringTokens, 5, trigger), steps=STEPS)
    options: dict[str, Any] = {"workers": 4, "stages": 2, "patience": PATIENCE, **changes}
    run = MendingRun(job, folder, **options)
    run.unreachable.update(unreachable)
    trigger.action = partial(run.wires.cut, ways)
    return run, run.run()


def assert_one_side_went_on(run: WiredRun, result: Result, gone: Collection[WorkerId]) -> None:
    assert result.outcome == "completed", result.message
    assert [record.step for record in result.steps] == list(range(1, STEPS + 1)), "no step is committed twice"
    assert result.bits == toy_bits(STEPS)
    (recovered,) = recoveries(result)
    assert set(recovered.lost) <= set(gone) and recovered.source == "peers"
    for worker in recovered.lost:
        # it may have had all it needed of the step that was under way, and of no other
        assert run.members[worker].follower.version <= recovered.from_version + 1


@pytest.mark.parametrize("ways", [both([1], [2]), between([1], [2]), between([2], [1])])
def test_two_workers_that_cannot_reach_each_other(tmp_path: Path, ways: list[Way]) -> None:
    run, result = run_cut(tmp_path, ways)
    assert_one_side_went_on(run, result, {1, 2})
    assert len(losses(result)) == 1


@pytest.mark.parametrize("ways", [both([3], [0, 1, 2]), between([3], [0, 1, 2]), between([0, 1, 2], [3])])
def test_a_worker_cut_off_from_all_others(tmp_path: Path, ways: list[Way]) -> None:
    run, result = run_cut(tmp_path, ways)
    assert_one_side_went_on(run, result, {3})


@pytest.mark.parametrize("ways", [both([2], [CONTROLLER]), between([2], [CONTROLLER])])
def test_a_worker_that_the_controller_does_not_hear(tmp_path: Path, ways: list[Way]) -> None:
    run, result = run_cut(tmp_path, ways)
    assert_one_side_went_on(run, result, {2})


def test_a_side_without_the_controller_stops(tmp_path: Path) -> None:
    """It even has all of the state. Nobody can end its processes until the wires are mended; then they
    leave by themselves."""
    here, there = [0, 1, CONTROLLER], [2, 3]
    domains = {0: "here", 1: "here", 2: "there", 3: "there"}
    run, result = run_cut(tmp_path, both(here, there), unreachable=there, domains=domains)
    assert_one_side_went_on(run, result, {2, 3})
    wait_until(lambda: all(run.members[w]._ended.is_set() for w in there), "they have left")


@pytest.mark.parametrize("how", ["cut", "silence"])
def test_a_worker_that_does_not_hear_the_controller(tmp_path: Path, how: str) -> None:
    """It does no harm while nothing happens; when somebody else is lost, it does not say what it holds, and
    the others go on without it."""
    trigger = Trigger(CUT_AT, 2)
    job = toy_job(tmp_path, build_data=partial(TriggeringTokens, 5, trigger), steps=STEPS)
    run = MendingRun(job, tmp_path, 4, 1, patience=PATIENCE)

    def cut_and_kill() -> None:
        getattr(run.wires, how)([(CONTROLLER, 2)])
        run.kill(0)

    trigger.action = cut_and_kill
    result = run.run()
    assert_one_side_went_on(run, result, {0, 2})
