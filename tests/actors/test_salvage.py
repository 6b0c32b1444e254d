"""An interrupted step goes on from what survivors have summed, bit for bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import actors.planning
from actors.follower import Follower
from actors.worker import Worker
from runtime.plan import Plan
from runtime.protocol import Resume
from runtime.salvage import Salvage
from runtime.speeds import Speeds
from strategies.job import Fault
from strategies.stage import StageModel
from tests.support.chaos import ChaosRun, recoveries
from tests.support.cluster import toy_job
from tests.support.expected import toy_bits
from tests.support.ray_jobs import wait_until

STEPS = 5
LOSSES = [
    (workers, stages, victim, at, micro_batch)
    for workers, stages, victims in ((3, 1, (1, 1)), (4, 2, (0, 1, 2, 3)), (6, 3, (2, 3)))
    for row, victim in enumerate(victims)
    for column, (at, micro_batch) in enumerate(
        (("forward", 4), ("backward", 3), ("reduce", None), ("exchange", None))
    )
    if (row + column) % 2 == 0
]
"""Every layout meets every point; every victim meets two of them."""


def run(folder: Path, workers: int, stages: int, faults: tuple[Fault, ...], **changes: Any) -> ChaosRun:
    return ChaosRun(toy_job(folder, faults=faults, steps=STEPS, **changes), folder, workers, stages)


@pytest.mark.parametrize(("workers", "stages", "victim", "at", "micro_batch"), LOSSES)
def test_a_step_goes_on(
    tmp_path: Path, workers: int, stages: int, victim: int, at: str, micro_batch: int | None
) -> None:
    result = run(tmp_path, workers, stages, (Fault(victim, 3, at, micro_batch),)).run()
    assert result.outcome == "completed", result.message
    assert result.bits == toy_bits(STEPS)
    assert all(record.samples == 10 for record in result.steps)


def test_only_what_the_lost_worker_did_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All micro-batches are summed when worker 1 dies: its own are computed again, and no others."""
    backwards: Counter[tuple[int, int]] = Counter()
    backward = StageModel.backward

    def counting(self: StageModel, step: int, micro_batch: int, *rest: Any, **named: Any) -> None:
        if step == 3:
            backwards[self.held[0][0], micro_batch] += 1
        backward(self, step, micro_batch, *rest, **named)

    monkeypatch.setattr(StageModel, "backward", counting)
    arrived: set[int] = set()
    reach = Worker._fault

    def reaching(self: Worker, where: str, step: int, micro_batch: int) -> None:
        """Who is to die waits until all copies of version 2 are in place: else there is nothing to keep."""
        if (where, step) == ("exchange", 3):
            arrived.add(self.worker)
            if self.worker == 1:
                wait_until(lambda: len(arrived) == 6, "the others in the exchange")
        reach(self, where, step, micro_batch)

    monkeypatch.setattr(Worker, "_fault", reaching)
    made = run(tmp_path, 6, 2, (Fault(1, 3, "exchange"),))  # so many that it pays, however they are measured
    result = made.run()
    assert result.bits == toy_bits(STEPS)
    (recovered,) = recoveries(result)
    assert 0.0 < recovered.kept < 1.0
    again = {place for place, count in backwards.items() if count > 1}
    assert {first for first, _ in again} == {0}, "only the lost worker's stage"
    assert len(backwards) == 10 and 0 < len(again) < 5, "only its micro-batches"
    assert max(backwards.values()) == 2


def test_a_stage_with_nobody_left_is_rebuilt_while_the_others_sums_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only worker of a stage dies when all is summed: one of the others' stage takes its place."""
    monkeypatch.setattr(actors.planning, "pays", lambda *_: True)
    reach, arrived = Worker._fault, set[int]()

    def reaching(self: Worker, where: str, step: int, micro_batch: int) -> None:
        plan = self.follower.plan
        if (where, step) == ("exchange", 3) and plan is not None and len(plan.workers) == 3:
            arrived.add(self.worker)
            if any(stage.workers == (self.worker,) for stage in plan.stages):
                wait_until(lambda: len(arrived) == 3, "the others in the exchange")
                self._inject("SIGKILL")
        reach(self, where, step, micro_batch)

    monkeypatch.setattr(Worker, "_fault", reaching)
    result = run(tmp_path, 3, 2, ()).run()
    assert result.bits == toy_bits(STEPS)
    (recovered,) = recoveries(result)
    assert 0.0 < recovered.kept < 0.5, "what the one who stays in its stage has summed"


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    result = run(tmp_path, 4, 2, (Fault(1, 3, "exchange"),), salvage=False).run()
    assert result.bits == toy_bits(STEPS)
    assert [event.kept for event in recoveries(result)] == [0.0]


@pytest.mark.parametrize(
    ("second", "at"),
    [(0, "recovery"), (2, "recovery"), (3, "recovery"), (0, "forward"), (2, "reduce"), (3, "gather")],
)
def test_a_further_loss_while_the_step_is_finished(tmp_path: Path, second: int, at: str) -> None:
    faults = (Fault(1, 3, "exchange"), Fault(second, 3, at))
    result = run(tmp_path, 6, 2, faults).run()
    assert result.outcome == "completed", result.message
    assert result.bits == toy_bits(STEPS)


def test_what_others_wait_for_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody of stage 0 dies when it begins its last micro-batch, and stage 1 is through with all others:
    who takes over does the one that stage 1 has never seen before those."""
    monkeypatch.setattr(actors.planning, "pays", lambda *_: True)
    # however they are measured: else one of stage 1 may be sent to help
    for what in ("forward", "backward", "of"):
        monkeypatch.setattr(Speeds, what, lambda *_: 1.0)
    reach, follow = Worker._fault, Follower.follow
    forward, backward = StageModel.forward, StageModel.backward
    through: set[int] = set()
    last: list[int] = []
    seen: list[tuple[Plan, Salvage]] = []
    begun: list[tuple[bool, int]] = []

    def reaching(self: Worker, where: str, step: int, micro_batch: int) -> None:
        reach(self, where, step, micro_batch)
        plan = self.follower.plan
        if not last and (where, step) == ("forward", 3) and plan and self.worker == plan.stages[0].workers[1]:
            mine = plan.micro_batches_of(self.worker)
            if micro_batch == mine[-1]:
                last.append(micro_batch)
                # by then the copies of version 2 are in place too: else there is nothing to keep
                wait_until(lambda: len(through) == plan.micro_batches - 1, "stage 1")
                self._inject("SIGKILL")

    def following(self: Follower, resume: Resume) -> None:
        if resume.salvage is not None:
            seen.append((resume.plan, resume.salvage))
        follow(self, resume)

    def noting(self: StageModel, step: int, micro_batch: int, *rest: Any, **named: Any) -> Any:
        if (step, self.held[0][0]) == (3, 0):
            begun.append((bool(seen), micro_batch))
        return forward(self, step, micro_batch, *rest, **named)

    def ending(self: StageModel, step: int, micro_batch: int, *rest: Any, **named: Any) -> None:
        backward(self, step, micro_batch, *rest, **named)
        if step == 3 and self.held[0][0]:
            through.add(micro_batch)

    monkeypatch.setattr(Worker, "_fault", reaching)
    monkeypatch.setattr(Follower, "follow", following)
    monkeypatch.setattr(StageModel, "backward", ending)
    monkeypatch.setattr(StageModel, "forward", noting)
    result = run(tmp_path, 4, 2, ()).run()
    assert result.bits == toy_bits(STEPS)
    plan, salvaged = seen[0]
    survivor = plan.stages[0].workers[0]
    anew = [m for m in plan.micro_batches_of(survivor) if salvaged.status(0, m) is None]
    awaited = [m for m in anew if salvaged.is_awaited(plan, 0, m)]
    assert last[0] in awaited and len(awaited) < len(anew), (awaited, anew)
    after = [m for resumed, m in begun if resumed]
    assert after == awaited + [m for m in anew if m not in awaited]
