"""The controller: events in, commands and notes out. It does no I/O and reads no clock.

Workers run step after step by themselves; the controller acts only when something happens. Whoever
drives it (a Ray actor, a test, a simulation) passes in every event with the time at which it came.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

from runtime.events import (
    CheckpointSkipped,
    FaultInjected,
    Paused,
    RunStarted,
    StepRecord,
    StepRepeated,
    WorkerLost,
)
from runtime.incident import Incident
from runtime.layout import Layout
from runtime.plan import Member, Plan, WorkerId
from runtime.protocol import (
    Exponents,
    Failing,
    Finished,
    Held,
    Injecting,
    Interrupt,
    Leave,
    Measured,
    Moved,
    PeerLost,
    Repeated,
    Report,
    Resume,
    StateSource,
    Stepped,
    Stop,
    Unwritten,
    Written,
)
from runtime.resharding import Transfer, newest_complete_version, plan_transfers
from runtime.signals import (
    CommandsSent,
    Committed,
    Durable,
    End,
    Input,
    Joined,
    Lost,
    ManifestFailed,
    ManifestWritten,
    Note,
    Output,
    PlanChooser,
    Send,
    StopRequested,
    TakenBack,
    Terms,
    WriteManifest,
)
from runtime.speeds import Speeds


class Phase(Enum):
    FORMING = "forming"
    AGREEING = "agreeing"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


@dataclass
class Controller:
    """The transitions. ``handle`` is the only entry."""

    terms: Terms
    choose_plan: PlanChooser
    phase: Phase = Phase.FORMING
    generation: int = 0
    plan: Plan | None = None
    members: dict[WorkerId, Member] = field(default_factory=dict)
    speeds: Speeds = field(default_factory=Speeds)
    durable: Durable | None = None
    next_record: int = 1
    stopping: bool = False
    _addresses: dict[WorkerId, str] = field(default_factory=dict)
    _fenced: set[WorkerId] = field(default_factory=set)
    _held: dict[WorkerId, Held] = field(default_factory=dict)
    _finished: dict[WorkerId, int] = field(default_factory=dict)
    _parts: dict[tuple[int, int], dict[WorkerId, Written]] = field(default_factory=dict)
    _died_at: dict[WorkerId, float] = field(default_factory=dict)
    _incident: Incident | None = None
    _writing: set[int] = field(default_factory=set)
    _reached: int = 0
    _unwritten: int = -1

    def __post_init__(self) -> None:
        self.durable = self.terms.start
        self._reached = self.terms.start.version if self.terms.start else 0
        self.next_record = self._reached + 1

    def handle(self, event: Input, now: float) -> list[Output]:
        """What is to be done about ``event``, which came at ``now`` (seconds, any fixed origin)."""
        if self.phase is Phase.ENDED:
            return []
        match event:
            case Joined():
                return self._joined(event)
            case Lost(worker, reason):
                return self._lost(worker, reason, now)
            case StopRequested():
                return self._stop(now)
            case CommandsSent():
                if self._incident and self.phase is Phase.RUNNING:
                    self._incident.sent(now)
                return []
            case ManifestWritten(durable):
                return self._manifest_written(durable)
            case ManifestFailed(version):
                self._writing.discard(version)
                self._parts = {key: parts for key, parts in self._parts.items() if key[0] != version}
                self._unwritten = max(self._unwritten, version)
                return self._end_if_finished()
        if event.worker not in self.members:
            return []  # a fenced or unknown worker can do no harm
        return self._report(event, now)

    def _report(self, report: Report, now: float) -> list[Output]:
        match report:
            case Held():
                return self._agree(report, now)
            case Moved():
                return self._moved(report, now)
            case Stepped(_, record):
                return self._stepped(record)
            case Measured(step=step):
                self.speeds.observe(report)
                self._reached = max(self._reached, step)
                return []
            case Repeated(_, step, attempt):
                return [Note(StepRepeated(step, attempt))]
            case Written():
                return self._written(report)
            case Unwritten(_, version, problem):
                self._unwritten = max(self._unwritten, version)
                return [Note(CheckpointSkipped(problem)), *self._end_if_finished()]
            case Finished(worker, generation, version):
                if generation == self.generation:
                    self._finished[worker] = version
                return self._end_if_finished()
            case PeerLost(worker, peer, reason):
                return (
                    self._lost(peer, f"worker {worker} says: {reason}", now) if peer in self.members else []
                )
            case Failing(worker, error):
                return self._end("failed", f"worker {worker}: {error}")
            case Injecting(worker, step, where, signal, at):
                self._died_at[worker] = at
                return [Note(FaultInjected(step, worker, where, signal))]

    # --- membership -------------------------------------------------------------------------

    def _joined(self, event: Joined) -> list[Output]:
        assert self.phase is Phase.FORMING, "workers join only while the run is being formed"
        self.members[event.worker] = Member(event.worker, event.domain)
        self._addresses[event.worker] = event.address
        self.speeds.warm_up(event.forward, event.backward)
        return self._form_if_complete()

    def _form_if_complete(self) -> list[Output]:
        if len(self.members) + len(self._fenced) < self.terms.workers:
            return []
        if len(self.members) < self.terms.min_workers:
            return self._end(
                "failed",
                f"only {len(self.members)} of {self.terms.workers} workers started, fewer than "
                f"parallel.min_workers ({self.terms.min_workers}): see the workers' logs",
            )
        resuming = self._resume_from_durable()
        assert self.plan is not None
        started = RunStarted(
            run=self.terms.run,
            steps=self.terms.steps,
            workers=len(self.members),
            stages=len(self.plan.stages),
            from_version=self.next_record - 1,
            source="initial" if self.durable is None else "checkpoint",
        )
        return [Note(started), *resuming]

    def _lost(self, worker: WorkerId, reason: str, now: float) -> list[Output]:
        if worker in self._fenced:
            return []
        self._fenced.add(worker)
        was_member = self.members.pop(worker, None) is not None
        outputs: list[Output] = [
            Note(WorkerLost(self._reached + 1, worker, reason)),
            Send(worker, Leave("fenced out: " + reason)),
        ]
        if self.phase is Phase.FORMING:
            return outputs + self._form_if_complete()
        if not was_member:
            return outputs
        if not self.members:
            return outputs + self._end("failed", "every worker was lost: start again with --resume")
        incident = self._incident
        if incident is None or incident.over:
            incident = Incident(self._reached + 1, len(self.members) + 1, began=now)
        incident.lose(worker, reason, now, died_at=self._died_at.get(worker))
        self._incident = incident
        self.generation += 1
        outputs += self._give_up_parts()
        self._held.clear()
        self._finished.clear()
        self.phase = Phase.AGREEING
        interrupt = Interrupt(self.generation, tuple(sorted(self._fenced)))
        return outputs + [Send(member, interrupt) for member in sorted(self.members)]

    def _agree(self, held: Held, now: float) -> list[Output]:
        if held.generation != self.generation or self.phase is not Phase.AGREEING:
            return []
        self._held[held.worker] = held
        if len(self._held) < len(self.members):
            return []
        if len(self.members) < self.terms.min_workers and not self.stopping:
            self.phase = Phase.PAUSED
            return [Note(Paused(self._reached + 1, len(self.members), self.terms.min_workers))]
        return self._go_on(now)

    def _go_on(self, now: float) -> list[Output]:
        """From the newest step that survivors hold of every shard; else from the durable checkpoint."""
        assert self._incident is not None, "survivors are asked what they hold only after a loss"
        self._incident.agreed(now)
        holdings = {worker: held.holdings for worker, held in self._held.items()}
        version = newest_complete_version(self.terms.layout, holdings)
        if version is None:
            return self._resume_from_durable()
        exponents = next(held.exponents[version] for held in self._held.values() if version in held.exponents)
        plan = self._next_plan()
        working = {worker: held.working for worker, held in self._held.items()}
        transfers = plan_transfers(self.terms.layout, plan, version, holdings, working)
        unfinished = (record for held in self._held.values() for record in held.unfinished)
        record = next((record for record in unfinished if record.step == version), None)
        told = self._records_held(version)
        return told + self._resume(plan, version, "peers", exponents, transfers, record=record)

    def _records_held(self, version: int) -> list[Output]:
        """What the survivors know of committed steps that their reporter did not live to tell."""
        whole = {record.step: record for held in self._held.values() for record in held.records}
        steps = [step for step in sorted(whole) if step <= version]
        return [output for step in steps for output in self._stepped(whole[step])]

    def _resume_from_durable(self) -> list[Output]:
        if self.generation == 0:
            self.generation = 1
        plan = self._next_plan()
        if self.durable is None:
            return self._resume(plan, 0, "initial", None, ())
        durable = self.durable
        return self._resume(plan, durable.version, "checkpoint", durable.exponents, (), path=durable.path)

    def _next_plan(self) -> Plan:
        members = [replace(m, speed=self.speeds.of(m.worker)) for _, m in sorted(self.members.items())]
        return self.choose_plan(self.generation, members, self.speeds, self.plan)

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
    ) -> list[Output]:
        self.plan = plan
        self.phase = Phase.RUNNING
        self._reached = version
        taken_back: list[Output] = [TakenBack(version)] if version + 1 < self.next_record else []
        self.next_record = min(self.next_record, version + 1)
        if self._incident:
            lost_work = max((held.ages.get(version, 0.0) for held in self._held.values()), default=0.0)
            self._incident.planned(self.members, version, source, lost_work)
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
        )
        return taken_back + [Send(worker, resume) for worker in plan.workers]

    def _moved(self, report: Moved, now: float) -> list[Output]:
        incident = self._incident
        if incident is None or incident.over or report.generation != self.generation:
            return []
        incident.moved(report.worker, report.bytes_received, now)
        return [Note(incident.recovered())] if incident.over else []

    # --- progress ---------------------------------------------------------------------------

    def _stepped(self, record: StepRecord) -> list[Output]:
        if record.step < self.next_record or record.generation > self.generation:
            return []
        self.next_record = record.step + 1
        return [Committed(record), *self._due_manifests()]

    def _written(self, report: Written) -> list[Output]:
        if self.durable is not None and report.version <= self.durable.version:
            return self._end_if_finished()
        # parts written under different plans overlap, so only those of one generation make a whole
        self._parts.setdefault((report.version, report.generation), {})[report.worker] = report
        return self._due_manifests()

    def _due_manifests(self) -> list[Output]:
        """Orders for the checkpoints whose parts are whole and whose step is on record: a run that goes
        on from a checkpoint has no gap in its log."""
        orders: list[Output] = []
        for (version, _), parts in sorted(self._parts.items()):
            files = tuple(sorted((part.file for part in parts.values()), key=lambda file: file.name))
            pieces = (piece for file in files for piece in file.pieces)
            if version in self._writing or version >= self.next_record:
                continue
            if covers(self.terms.layout, pieces):
                self._writing.add(version)
                orders.append(WriteManifest(version, next(iter(parts.values())).exponents, files))
        return orders

    def _give_up_parts(self) -> list[Output]:
        """A checkpoint of the plan that ends now, whose parts are not all there, stays unfinished."""
        versions = sorted({version for version, _ in self._parts} - self._writing)
        self._parts = {key: parts for key, parts in self._parts.items() if key[0] in self._writing}
        return [
            Note(CheckpointSkipped(f"a worker was lost while the checkpoint of step {version} was written"))
            for version in versions
        ]

    def _manifest_written(self, durable: Durable) -> list[Output]:
        self._writing.discard(durable.version)
        if self.durable is None or durable.version > self.durable.version:
            self.durable = durable
        self._parts = {key: parts for key, parts in self._parts.items() if key[0] > durable.version}
        return self._end_if_finished()

    def _stop(self, now: float) -> list[Output]:
        if self.stopping:
            return []
        self.stopping = True
        if self.phase is Phase.FORMING:
            return self._end("interrupted", "stopped before the first step")
        if self.phase is Phase.PAUSED:
            return self._go_on(now)
        return [Send(worker, Stop()) for worker in sorted(self.members)]

    def _end_if_finished(self) -> list[Output]:
        if len(self._finished) < len(self.members) or self.phase is not Phase.RUNNING:
            return []
        version = min(self._finished.values())
        written = self.durable is not None and self.durable.version >= version
        if not written and self._unwritten < version:
            return []
        outcome: Literal["completed", "interrupted"] = (
            "completed" if version >= self.terms.steps else "interrupted"
        )
        tail = "" if written else "; its last checkpoint could not be written"
        return self._end(outcome, f"{outcome} after {version} of {self.terms.steps} steps{tail}")

    def _end(self, outcome: Literal["completed", "interrupted", "failed"], message: str) -> list[Output]:
        self.phase = Phase.ENDED
        leaving: list[Output] = [Send(worker, Leave(message)) for worker in sorted(self.members)]
        return [*leaving, End(outcome, message)]


def covers(layout: Layout, pieces: Iterable[tuple[int, int, int]]) -> bool:
    """Whether the pieces (block, start, stop) together cover every block."""
    reached: dict[int, int] = {}
    for block, start, stop in sorted(pieces):
        if start <= reached.get(block, 0):
            reached[block] = max(stop, reached.get(block, 0))
    return all(reached.get(block.index, 0) >= block.size for block in layout.blocks)
