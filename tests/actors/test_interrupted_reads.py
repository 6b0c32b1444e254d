"""A read that waits ends as soon as a loss interrupts its reader, and the step goes on with the same bits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from runtime.fabric.interface import Interrupted
from runtime.samples import Read
from strategies.reading import Side, Wanted
from tests.support.chaos import ChaosRun
from tests.support.cluster import toy_job
from tests.support.expected import toy_bits
from tests.support.models import Tokens

STEP = 3


@dataclass
class Stall:
    """Of one ``side`` of a step: who reads micro-batch 0 waits until another worker's loss interrupts it.

    It may be any other: how many workers read, and when, depends on how the planner has divided the work.
    """

    side: Side
    lock: threading.Lock = field(default_factory=threading.Lock)
    reader: Stalling | None = None
    interrupted: int = 0
    run: ChaosRun | None = None

    def kill_another(self) -> None:
        assert self.run is not None
        others = [worker for worker, each in self.run.members.items() if each.data is not self.reader]
        self.run.kill(max(others))


class Stalling(Tokens):
    def __init__(self, stall: Stall) -> None:
        super().__init__(5)
        self._stall = stall

    def heed(self, check: Callable[[], None]) -> None:
        self._check = check

    def inputs(self, step: int, micro_batch: int) -> Read:
        self._read(Wanted(Side.INPUTS, step, micro_batch))
        return Read(self.micro_batch(step, micro_batch)[0], ())

    def targets(self, step: int, micro_batch: int) -> Read:
        self._read(Wanted(Side.TARGETS, step, micro_batch))
        return Read(self.micro_batch(step, micro_batch)[1], ())

    def _read(self, wanted: Wanted) -> None:
        stall = self._stall
        if wanted != (stall.side, STEP, 0):
            return
        with stall.lock:
            if stall.reader is not None:
                return
            stall.reader = self
        stall.kill_another()
        until = time.monotonic() + 20.0
        while time.monotonic() < until:
            try:
                self._check()
            except Interrupted:
                stall.interrupted += 1
                raise
            time.sleep(0.005)


@pytest.mark.parametrize("salvage", [True, False])
@pytest.mark.parametrize(
    ("workers", "stages", "side"), [(3, 1, Side.INPUTS), (3, 1, Side.TARGETS), (4, 2, Side.TARGETS)]
)
def test_a_read_that_waits_is_interrupted_by_a_loss(
    tmp_path: Path, workers: int, stages: int, side: Side, salvage: bool
) -> None:
    stall = Stall(side)
    job = toy_job(tmp_path, build_data=partial(Stalling, stall), salvage=salvage)
    stall.run = ChaosRun(job, tmp_path, workers, stages)
    result = stall.run.run()
    assert result.outcome == "completed" and result.bits == toy_bits()
    assert stall.interrupted == 1
