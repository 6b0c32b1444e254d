"""How far the run has come: records in order, whole checkpoints, the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from runtime.control.state import ControllerState, Phase
from runtime.events import (
    StepRecord,
)
from runtime.signals import (
    Committed,
    Output,
)


class Progress(ControllerState):
    """Takes what workers report of steps and checkpoints."""

    def _stepped(self, record: StepRecord) -> list[Output]:
        """Records come in order; one with a gap before it waits for what fills the gap."""
        if record.step < self.next_record or record.generation > self.generation:
            return []
        self._ahead[record.step] = record
        outputs: list[Output] = []
        while self.next_record in self._ahead:
            outputs += self._commit(self._ahead.pop(self.next_record))
        return outputs

    def _commit(self, record: StepRecord) -> list[Output]:
        self.next_record = record.step + 1
        self._step_seconds = [*self._step_seconds[-15:], record.seconds]
        return [Committed(record), *self._parts.due(self.next_record - 1)]

    def _stepped_in_order(self, records: Iterable[StepRecord]) -> list[Output]:
        ordered = sorted(records, key=lambda record: record.step)
        return [output for record in ordered for output in self._stepped(record)]

    def _records_held(self, version: int) -> list[Output]:
        """What the survivors know of committed steps that their reporter did not live to tell."""
        whole = {record.step: record for held in self._held.values() for record in held.records}
        told = self._stepped_in_order(record for step, record in whole.items() if step <= version)
        told += self._past_gaps(version)
        self._ahead.clear()
        return told

    def _past_gaps(self, version: int) -> list[Output]:
        """The records up to ``version`` that wait for others which nobody is left to tell: better a gap in
        the log than none of the rest."""
        waiting = sorted(step for step in self._ahead if step <= version)
        return [output for step in waiting for output in self._commit(self._ahead.pop(step))]

    def _end_if_finished(self) -> list[Output]:
        if self.plan is None or self.phase is not Phase.RUNNING:
            return []
        if len(self._finished) < len(self.plan.workers) or not set(self.plan.workers) <= set(self._finished):
            return []
        version = min(self._finished.values())
        written = self._parts.reaches(version)
        if not written and self._unwritten < version:
            return []
        outcome: Literal["completed", "interrupted"] = (
            "completed" if version >= self.terms.steps else "interrupted"
        )
        tail = "" if written else "; its last checkpoint could not be written"
        return self._end(outcome, f"{outcome} after {version} of {self.terms.steps} steps{tail}")
