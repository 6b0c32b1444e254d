"""An interrupted step goes on from what survivors have summed, bit for bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from actors.worker import Worker
from strategies.job import Fault
from strategies.stage import StageModel
from tests.support.chaos import ChaosRun, recoveries
from tests.support.cluster import toy_job
from tests.support.expected import toy_bits
from tests.support.ray_jobs import wait_until

STEPS = 5
LOSSES = [
    (workers, stages, victim, at, micro_batch)
    for workers, stages, victims in ((3, 1, (1,)), (4, 2, (0, 1, 2, 3)), (6, 3, (2, 3)))
    for victim in victims
    for at, micro_batch in (("forward", 4), ("backward", 3), ("reduce", None), ("exchange", None))
]


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


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    result = run(tmp_path, 4, 2, (Fault(1, 3, "exchange"),), salvage=False).run()
    assert result.bits == toy_bits(STEPS)
    assert [event.kept for event in recoveries(result)] == [0.0]


@pytest.mark.parametrize("second", [0, 2, 3])
@pytest.mark.parametrize("at", ["recovery", "forward", "reduce", "gather"])
def test_a_further_loss_while_the_step_is_finished(tmp_path: Path, second: int, at: str) -> None:
    faults = (Fault(1, 3, "exchange"), Fault(second, 3, at))
    result = run(tmp_path, 6, 2, faults).run()
    assert result.outcome == "completed", result.message
    assert result.bits == toy_bits(STEPS)
