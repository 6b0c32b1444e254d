"""The records of the last steps as one worker knows them, and who of them is told."""

from __future__ import annotations

from dataclasses import replace

from actors.line import Line
from runtime.events import StepRecord
from runtime.plan import Plan, WorkerId
from runtime.protocol import Stepped
from strategies.share import Outcome

RECORDS_KEPT = 3
"""Whole records that a worker keeps, for the case that their reporter dies before it is heard."""

REPORTERS_KEEP = 256
"""Those that a reporter keeps, for the case that a controller dies with what it has not yet put on record."""


class StepRecords:
    """A step's record becomes whole with the next exchange, which tells its result's fingerprint."""

    def __init__(self, worker: WorkerId, line: Line) -> None:
        self._worker, self._line = worker, line
        self._unfinished: dict[int, StepRecord] = {}
        self._whole: dict[int, StepRecord] = {}
        self._is_reporter = False

    @property
    def whole(self) -> tuple[StepRecord, ...]:
        return tuple(self._whole.values())

    @property
    def unfinished(self) -> tuple[StepRecord, ...]:
        return tuple(self._unfinished.values())

    def unfinished_of(self, step: int) -> StepRecord | None:
        return self._unfinished.get(step)

    def follow(self, plan: Plan, version: int, record: StepRecord | None) -> None:
        """Goes on from ``version`` under ``plan``: what came after it does not count. ``record`` is the
        unfinished one of step ``version``."""
        self._is_reporter = self._worker in plan.reporters
        self._whole = {step: whole for step, whole in self._whole.items() if step <= version}
        self._unfinished = {} if record is None else {version: record}

    def remember(self, record: StepRecord) -> None:
        self._unfinished[record.step] = record

    def complete(self, step: int, outcome: Outcome) -> None:
        """Completes the record of ``step`` by what the next exchange says of its result."""
        record = self._unfinished.pop(step, None)
        if record is None:
            return
        whole = replace(
            record,
            fingerprint=outcome.fingerprint,
            held_out_loss=outcome.held_out_loss,
            half_depth_loss=outcome.half_depth_loss,
        )
        kept = {**self._whole, step: whole}
        if self._line.is_open:  # else whoever comes next will ask for all of them
            oldest = step - (REPORTERS_KEEP if self._is_reporter else RECORDS_KEPT)
            kept = {s: known for s, known in kept.items() if s > oldest}
        self._whole = kept

    def tell(self, step: int) -> None:
        """Tells the controller of ``step``, if that is this worker's to do and the record is whole."""
        if self._is_reporter and step in self._whole:
            self._line.tell(Stepped(self._worker, self._whole[step]))
