"""After a loss: interrupt, agree on the newest complete step, go on from it."""

from __future__ import annotations

from dataclasses import replace

from runtime.control.boundary import Boundary
from runtime.control.state import Phase
from runtime.events import (
    CheckpointSkipped,
    Paused,
    Resumed,
    StateSource,
    StepRecord,
)
from runtime.plan import Plan, WorkerId
from runtime.protocol import (
    Exponents,
    Held,
    Interrupt,
    Resume,
)
from runtime.resharding import Transfer, newest_complete_version, plan_transfers
from runtime.salvage import Salvage, kept
from runtime.signals import (
    Note,
    Output,
    Send,
    TakenBack,
)


class Recovery(Boundary):
    """Everybody is interrupted, tells what it holds, and gets a new plan."""

    def _interrupt(self, now: float) -> list[Output]:
        """Has everybody leave what it waits for and tell what it holds."""
        self.generation += 1
        self._change = None
        self._unsettled.clear()
        self._disputes.clear()
        self._held.clear()
        self._finished.clear()
        self._considered = frozenset()
        self._asked, self._asked_at = set(self.members), now
        self.phase = Phase.AGREEING
        skipped: list[Output] = [
            Note(CheckpointSkipped(f"a worker was lost while the checkpoint of step {version} was written"))
            for version in self._parts.give_up()
        ]
        interrupt = Interrupt(self.generation, tuple(sorted(self._fenced)))
        if not self._asked:
            return skipped + self._decide(now)
        return skipped + [Send(member, interrupt) for member in sorted(self._asked)]

    def _agree(self, held: Held, now: float) -> list[Output]:
        if held.generation != self.generation or self.phase is not Phase.AGREEING:
            return []
        self._held[held.worker] = held
        if len(self._held) < len(self._asked) or self._asked - set(self._held):
            return []
        return self._decide(now)

    def _decide(self, now: float) -> list[Output]:
        """All survivors have told what they hold: go on, or wait for what is missing."""
        if not self.members and self.stopping:
            return self._end("interrupted", "stopped while there was no worker")
        if not self.members or (len(self.members) < self.terms.min_workers and not self.stopping):
            return self._wait(now, ())
        holdings = {worker: held.holdings for worker, held in self._held.items()}
        version = newest_complete_version(self.terms.layout, holdings)
        silent = self._out_of_reach & set(self.plan.workers if self.plan else ())
        if version is None and silent:
            # they may live, and hold what is missing: going back without them would undo their steps
            return self._wait(now, tuple(sorted(silent)))
        return self._go_on(version, now)

    def _wait(self, now: float, cut_off: tuple[WorkerId, ...]) -> list[Output]:
        was_paused, self.phase = self.phase is Phase.PAUSED, Phase.PAUSED
        if cut_off:  # as a rule it turns out at once that their processes have ended
            self._cut_off, self._cut_off_at = cut_off, now
            return self._hire(now)
        if was_paused:
            return []
        self._paused_at = now if self._paused_at is None else self._paused_at
        return [Note(self._paused()), *self._hire(now)]

    def _paused(self) -> Paused:
        return Paused(self._reached + 1, len(self.members), self.terms.min_workers, self._cut_off)

    def _go_on(self, version: int | None, now: float) -> list[Output]:
        """From the newest step that survivors hold of every shard; else from the durable checkpoint."""
        if self._incident:
            self._incident.agreed(now)
        resumed: list[Output] = []
        if self._paused_at is not None:
            seconds, self._paused_at, self._cut_off = now - self._paused_at, None, ()
            resumed = [Note(Resumed(self._reached + 1, len(self._chosen()), seconds))]
        if version is None:
            return resumed + self._resume_from_durable()
        holders = [held for held in self._held.values() if version in held.exponents]
        plan, salvaged = self._mended_plan(version) or (self._next_plan(), None)
        holdings = {worker: held.holdings for worker, held in self._held.items()}
        working = {worker: held.working for worker, held in self._held.items()}
        transfers = plan_transfers(self.terms.layout, plan, version, holdings, working)
        unfinished = (record for held in self._held.values() for record in held.unfinished)
        record = next((record for record in unfinished if record.step == version), None)
        told = self._records_held(version)
        exponents = holders[0].exponents[version]
        return (
            resumed
            + told
            + self._resume(plan, version, "peers", exponents, transfers, record=record, salvaged=salvaged)
        )

    def _mended_plan(self, version: int) -> tuple[Plan, Salvage] | None:
        """The plan to finish the interrupted step under, where survivors have done enough of it.

        ``_considered`` stays empty: at the next boundary the work is divided anew.
        """
        if self.mend_plan is None or self.plan is None or self.stopping:
            return None
        progress = {worker: held.progress for worker, held in self._held.items() if held.progress is not None}
        members = [
            replace(member, speed=self.speeds.of(worker))
            for worker, member in sorted(self.members.items())
            if worker in self.plan.workers or worker not in self._notices
        ]
        return self.mend_plan(self.generation, members, self.speeds, self.plan, version + 1, progress)

    def _resume_from_durable(self) -> list[Output]:
        if self.generation == 0:
            self.generation = 1
        plan = self._next_plan()
        if self.durable is None:
            return self._resume(plan, 0, "initial", None, ())
        durable = self.durable
        return self._resume(plan, durable.version, "checkpoint", durable.exponents, (), path=durable.path)

    def _resume(
        self,
        plan: Plan,
        version: int,
        source: StateSource,
        exponents: Exponents,
        transfers: tuple[Transfer, ...],
        *,
        path: str | None = None,
        record: StepRecord | None = None,
        salvaged: Salvage | None = None,
    ) -> list[Output]:
        self.plan = plan
        self.phase = Phase.RUNNING
        self._reached = version
        self._pause = 0.0
        self._unsettled = set(plan.workers)
        taken_back: list[Output] = [TakenBack(version)] if version + 1 < self.next_record else []
        self.next_record = min(self.next_record, version + 1)
        self._ahead.clear()
        if self._incident:
            lost_work = max((held.ages.get(version, 0.0) for held in self._held.values()), default=0.0)
            self._incident.planned(plan.workers, version, source, lost_work, kept(plan, salvaged))
        resume = Resume(
            plan=plan,
            version=version,
            source=source,
            addresses={worker: self._addresses[worker] for worker in self.members},
            transfers=transfers,
            exponents=exponents,
            stop_at=version if self.stopping else self.terms.steps,
            checkpoint=path,
            record=record,
            salvage=salvaged,
        )
        servers = {transfer.source for transfer in transfers}
        return taken_back + [Send(worker, resume) for worker in sorted({*plan.workers, *servers})]
