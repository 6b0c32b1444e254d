"""A read that waits ends as soon as a loss interrupts its reader, and the step goes on with the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from runtime.fabric.interface import Interrupted
from runtime.samples import Read
from strategies.job import Fault
from strategies.reading import Side, Wanted
from tests.support.chaos import ChaosRun
from tests.support.cluster import toy_job
from tests.support.expected import toy_bits
from tests.support.models import Tokens


class Stalling(Tokens):
    """Once one read lasts until its reader is interrupted."""

    def __init__(self, stalls: list[Wanted], ended: list[Wanted]) -> None:
        super().__init__(5)
        self._stalls, self._ended = stalls, ended

    def heed(self, check: Callable[[], None]) -> None:
        self._check = check

    def inputs(self, step: int, micro_batch: int) -> Read:
        self._stall(Wanted(Side.INPUTS, step, micro_batch))
        return Read(self.micro_batch(step, micro_batch)[0], ())

    def targets(self, step: int, micro_batch: int) -> Read:
        self._stall(Wanted(Side.TARGETS, step, micro_batch))
        return Read(self.micro_batch(step, micro_batch)[1], ())

    def _stall(self, wanted: Wanted) -> None:
        if wanted not in self._stalls:
            return
        self._stalls.remove(wanted)
        until = time.monotonic() + 20.0
        while time.monotonic() < until:
            try:
                self._check()
            except Interrupted:
                self._ended.append(wanted)
                raise
            time.sleep(0.005)


@pytest.mark.parametrize("salvage", [True, False])
@pytest.mark.parametrize(
    ("workers", "stages", "side"), [(3, 1, "inputs"), (3, 1, "targets"), (4, 2, "targets")]
)
def test_a_read_that_waits_is_interrupted_by_a_loss(
    tmp_path: Path, workers: int, stages: int, side: str, salvage: bool
) -> None:
    stalls, ended = [Wanted(Side(side), 3, 0)], list[Wanted]()
    wanted = list(stalls)
    faults = (Fault(1, 3, "backward"),)
    build_data = partial(Stalling, stalls, ended)
    job = toy_job(tmp_path, build_data=build_data, faults=faults, salvage=salvage)
    result = ChaosRun(job, tmp_path, workers, stages).run()
    assert result.outcome == "completed" and result.bits == toy_bits()
    assert ended == wanted
