"""The controller: events in, commands and notes out. It does no I/O and reads no clock.

Workers run step after step by themselves; the controller acts only when something happens. Whoever
drives it (a Ray actor, a test, a simulation) passes in every event with the time at which it came.

Two roads lead to a new plan. After a loss everybody is interrupted, tells what it holds, and goes on from
the newest step that is complete (``_interrupt``, ``_decide``). For a join, a notice or a slow worker the
others are told of the new plan while they train, and go over to it at a step boundary (``_consider``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from statistics import median
from typing import Literal

from runtime.change import PlannedChange, boundary_transfers, same_work
from runtime.detection import Disputes, Watch
from runtime.events import (
    CheckpointSkipped,
    ControllerRestarted,
    DrainNotice,
    FaultInjected,
    Paused,
    Rebalanced,
    Resumed,
    RunStarted,
    StepRecord,
    StepRepeated,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
)
from runtime.hiring import Hiring
from runtime.incident import Incident
from runtime.learning import standing
from runtime.parts import CheckpointParts
from runtime.plan import Member, Plan, WorkerId
from runtime.protocol import (
    Beat,
    Change,
    Exponents,
    Failing,
    Finished,
    Heard,
    Held,
    Here,
    Injecting,
    Interrupt,
    Leave,
    Leaving,
    Measured,
    Moved,
    PeerLost,
    Probe,
    Repeated,
    Report,
    Resume,
    Settled,
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
    Dismiss,
    Drain,
    Durable,
    End,
    Input,
    Joined,
    Learn,
    Lost,
    ManifestFailed,
    ManifestWritten,
    Note,
    Output,
    PlanChooser,
    PlanGain,
    Send,
    StopRequested,
    TakenBack,
    Terms,
    Tick,
)
from runtime.speeds import Speeds

RECONSIDERED_EVERY = 8
"""Steps between two looks at whether measured speeds ask for another division of work."""

LEAST_GAIN = 0.05
"""Predicted relative gain in speed below which the work is not divided anew."""

PROBE_SECONDS = 0.5
"""How long greetings between workers may take, where nothing moves any more."""

LEARNING_SECONDS = 5.0
"""How long workers may take to tell a new controller where they stand."""


class Phase(Enum):
    FORMING = "forming"
    LEARNING = "learning"
    AGREEING = "agreeing"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class _Notice:
    reason: str
    since: float


@dataclass
class Controller:
    """The transitions. ``handle`` is the only entry.

    ``members`` are the workers that are ready, with or without work: those that wait in reserve are among
    them, and those that are to leave until nobody needs what they hold.
    """

    terms: Terms
    choose_plan: PlanChooser
    plan_gain: PlanGain | None = None
    phase: Phase = Phase.FORMING
    generation: int = 0
    plan: Plan | None = None
    members: dict[WorkerId, Member] = field(default_factory=dict)
    speeds: Speeds = field(default_factory=Speeds)
    next_record: int = 1
    stopping: bool = False
    _addresses: dict[WorkerId, str] = field(default_factory=dict)
    _fenced: set[WorkerId] = field(default_factory=set)
    _out_of_reach: set[WorkerId] = field(default_factory=set)
    _notices: dict[WorkerId, _Notice] = field(default_factory=dict)
    _asked: set[WorkerId] = field(default_factory=set)
    _held: dict[WorkerId, Held] = field(default_factory=dict)
    _here: dict[WorkerId, Here] = field(default_factory=dict)
    _learn: Learn | None = None
    _early: list[Report] = field(default_factory=list)
    _finished: dict[WorkerId, int] = field(default_factory=dict)
    _died_at: dict[WorkerId, float] = field(default_factory=dict)
    _incident: Incident | None = None
    _change: PlannedChange | None = None
    _pause: float = 0.0
    _unsettled: set[WorkerId] = field(default_factory=set)
    _considered: frozenset[WorkerId] = frozenset()
    _weighed: tuple[tuple[WorkerId, float], ...] = ()
    _paused_at: float | None = None
    _cut_off: tuple[WorkerId, ...] = ()
    _cut_off_at: float = 0.0
    _reached: int = 0
    _unwritten: int = -1
    _step_seconds: list[float] = field(default_factory=list)
    _ahead: dict[int, StepRecord] = field(default_factory=dict)
    _probes: int = 0
    _learning_since: float = 0.0

    def __post_init__(self) -> None:
        terms = self.terms
        self._parts = CheckpointParts(terms.layout, terms.start)
        self._reached = terms.start.version if terms.start else 0
        self.next_record = self._reached + 1
        wanted = 0 if terms.max_workers is None else terms.max_workers + terms.spares
        self._hiring = Hiring(wanted, terms.workers if terms.next_worker is None else terms.next_worker)
        self._watch = Watch(terms.patience)
        self._disputes = Disputes(terms.patience)

    @property
    def durable(self) -> Durable | None:
        """The newest whole checkpoint."""
        return self._parts.durable

    def handle(self, event: Input, now: float) -> list[Output]:
        """What is to be done about ``event``, which came at ``now`` (seconds, any fixed origin)."""
        if self.phase is Phase.ENDED:
            return []
        match event:
            case Joined():
                return self._joined(event, now)
            case Lost(worker, reason, confirmed):
                return self._lost(worker, reason, now, confirmed)
            case Drain(worker, reason, deadline):
                return self._drain(worker, reason, deadline, now)
            case Tick():
                return self._tick(now)
            case Learn():
                return self._begin_learning(event, now)
            case StopRequested():
                return self._stop(now)
            case CommandsSent():
                if self._incident and self.phase is Phase.RUNNING:
                    self._incident.sent(now)
                return []
            case ManifestWritten(durable):
                self._parts.whole(durable)
                return self._end_if_finished()
            case ManifestFailed(version):
                self._parts.failed(version)
                self._unwritten = max(self._unwritten, version)
                return self._end_if_finished()
            case Here():
                return self._learned(event, now)
        if self.phase is Phase.LEARNING and event.worker in self._asked:
            self._early.append(event)  # what it tells again right after it has said where it stands
            return []
        if event.worker not in self.members:
            return []  # a fenced or unknown worker can do no harm
        return self._report(event, now)

    def _report(self, report: Report, now: float) -> list[Output]:
        match report:
            case Beat(worker, progress, computing):
                self._watch.beat(worker, progress, computing, now)
                return []
            case Held():
                return self._agree(report, now)
            case Moved():
                return self._moved(report, now)
            case Settled(worker, generation):
                return self._settled(worker, generation, now)
            case Leaving(worker, reason, deadline):
                return self._drain(worker, reason, deadline, now)
            case Stepped(_, record):
                return self._stepped(record) + self._reconsider(now)
            case Measured(step=step):
                self.speeds.observe(report)
                self._reached = max(self._reached, step)
                return []
            case Repeated(_, step, attempt):
                return [Note(StepRepeated(step, attempt))]
            case Written():
                self._parts.written(report)
                return [*self._parts.due(self.next_record - 1), *self._end_if_finished()]
            case Unwritten(_, version, problem):
                self._unwritten = max(self._unwritten, version)
                return [Note(CheckpointSkipped(problem)), *self._end_if_finished()]
            case Finished(worker, generation, version):
                running = self.phase is Phase.RUNNING
                if running and self.plan and generation == self.plan.generation:
                    self._finished[worker] = version
                return self._end_if_finished()
            case PeerLost(worker, peer):
                if peer in self.members:  # its own link to here says more, if it is really gone
                    self._disputes.accuse(worker, peer, now)
                return []
            case Heard(worker, number, peers):
                if number == self._probes and self.plan is not None:
                    for peer in set(self.plan.workers) - peers - {worker}:
                        self._disputes.accuse(worker, peer, now)
                return []
            case Failing(worker, error):
                return self._end("failed", f"worker {worker}: {error}")
            case Injecting(worker, step, where, signal, at):
                self._died_at[worker] = at
                return [Note(FaultInjected(step, worker, where, signal))]
            case Here():
                raise AssertionError("told to handle(), not here")

    # --- who is there -----------------------------------------------------------------------

    def _joined(self, event: Joined, now: float) -> list[Output]:
        self._hiring.arrived(event.worker)
        self._admit(event)
        if self.phase is Phase.FORMING:
            return self._form_if_complete(now)
        if self.phase is Phase.PAUSED:
            return self._decide(now)
        return self._consider(now)

    def _admit(self, event: Joined | Here) -> None:
        self.members[event.worker] = Member(event.worker, event.domain)
        self._addresses[event.worker] = event.address
        self.speeds.warm_up(event.forward, event.backward)

    def _form_if_complete(self, now: float) -> list[Output]:
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
            workers=len(self.plan.workers),
            stages=len(self.plan.stages),
            from_version=self.next_record - 1,
            source="initial" if self.durable is None else "checkpoint",
        )
        return [Note(started), *resuming, *self._hire(now)]

    def _hire(self, now: float) -> list[Output]:
        if self.phase in (Phase.FORMING, Phase.LEARNING) or self.stopping:
            return []
        return list(self._hiring.orders(len(self.members) - len(self._notices), now))

    def _lost(self, worker: WorkerId, reason: str, now: float, confirmed: bool = True) -> list[Output]:
        if confirmed and worker in self._out_of_reach:
            self._out_of_reach.discard(worker)
            return self._decide(now) if self.phase is Phase.PAUSED else []
        if worker in self._fenced:
            return []
        if self.phase is Phase.FORMING and worker < self._hiring.next_worker - self.terms.workers:
            return []  # of an earlier try to form this run
        self._fenced.add(worker)
        self._hiring.lost(worker, now)
        was_member = self.members.pop(worker, None) is not None
        had_part = worker in self._with_a_part()
        self._notices.pop(worker, None)
        self._watch.forget(worker)
        self._disputes.forget(worker)
        if not confirmed:
            self._out_of_reach.add(worker)
        outputs: list[Output] = [
            Note(WorkerLost(self._reached + 1, worker, reason, idle=not (was_member and had_part))),
            Dismiss(worker),
        ]
        if worker in self._addresses:
            outputs.insert(1, Send(worker, Leave("fenced out: " + reason)))
        if self.phase is Phase.FORMING:
            return outputs + self._form_if_complete(now)
        if self.phase is Phase.LEARNING:
            self._asked.discard(worker)
            return outputs + self._conclude_if_learned(now)
        if not was_member or not had_part:
            self._asked.discard(worker)
            self._held.pop(worker, None)
            all_told = self.phase is Phase.AGREEING and not self._asked - set(self._held)
            return outputs + self._hire(now) + (self._decide(now) if all_told else [])
        if not self.members and self.terms.max_workers is None:
            return outputs + self._end("failed", "every worker was lost: start again with --resume")
        incident = self._incident
        if incident is None or incident.over:
            at_work = set(self.plan.workers if self.plan else ()) & {worker, *self.members}
            incident = Incident(self._reached + 1, len(at_work), began=now)
        incident.lose(worker, reason, now, died_at=self._died_at.get(worker))
        self._incident = incident
        return outputs + self._interrupt(now) + self._hire(now)

    def _with_a_part(self) -> set[WorkerId]:
        """The members that the present plan, a change under way or a move still needs."""
        needed = set(self.plan.workers) if self.plan else set()
        if self._change is not None:
            needed.update(self._change.concerned)
        if self._unsettled or self.phase in (Phase.AGREEING, Phase.PAUSED):
            needed.update(self._notices)
        return needed

    def _drain(self, worker: WorkerId, reason: str, deadline: float | None, now: float) -> list[Output]:
        if worker not in self.members or worker in self._notices:
            return []
        self._notices[worker] = _Notice(reason, now)
        outputs: list[Output] = [Note(DrainNotice(self._reached + 1, worker, reason, deadline))]
        if self.phase in (Phase.FORMING, Phase.LEARNING):
            return outputs
        return outputs + self._hire(now) + self._release(now) + self._consider(now)

    def _release(self, now: float) -> list[Output]:
        """Lets go of those who are to leave and are no longer needed."""
        if self.phase is not Phase.RUNNING or self._unsettled or self._change is not None:
            return []
        assert self.plan is not None
        outputs: list[Output] = []
        for worker in sorted(set(self._notices) - set(self.plan.workers)):
            notice = self._notices.pop(worker)
            del self.members[worker]
            self._fenced.add(worker)
            self._watch.forget(worker)
            after = len(self.plan.workers)
            left = WorkerLeft(
                step=self._reached + 1,
                worker=worker,
                reason=notice.reason,
                workers_before=after + 1,
                workers_after=after,
                seconds=self._pause,
                notice_seconds=now - notice.since,
            )
            outputs += [Note(left), Send(worker, Leave(notice.reason)), Dismiss(worker)]
        return outputs

    def _tick(self, now: float) -> list[Output]:
        self._watch.tick(now)
        outputs: list[Output] = []
        if self.phase is Phase.LEARNING and now - self._learning_since > LEARNING_SECONDS:
            for worker in sorted(self._asked - set(self._here)):
                outputs += self._lost(worker, "did not answer a new controller", now, confirmed=False)
        for worker, reason in self._watch.overdue(now, self._median_step()):
            outputs += self._lost(worker, reason, now, confirmed=False)
        for worker in self._disputes.due(now, self.members):
            outputs += self._lost(worker, "cut off from other workers", now, confirmed=False)
        if self.phase is Phase.RUNNING and self._watch.stalled(now, self._median_step()):
            assert self.plan is not None
            self._watch.stirred(now)
            self._probes += 1
            probe = Probe(self._probes, self.plan.workers, PROBE_SECONDS)
            outputs += [Send(worker, probe) for worker in self.plan.workers if worker in self.members]
        waits_for = self._cut_off and now - self._cut_off_at > self.terms.patience.silence_seconds
        if self.phase is Phase.PAUSED and waits_for and self._paused_at is None:
            self._paused_at = self._cut_off_at
            outputs.append(Note(self._paused()))
        return outputs + self._hire(now)

    def _median_step(self) -> float:
        return median(self._step_seconds) if self._step_seconds else 0.0

    # --- after a loss -----------------------------------------------------------------------

    def _interrupt(self, now: float) -> list[Output]:
        """Has everybody leave what it waits for and tell what it holds."""
        self.generation += 1
        self._change = None
        self._unsettled.clear()
        self._disputes.clear()
        self._held.clear()
        self._finished.clear()
        self._considered = frozenset()
        self._asked = set(self.members)
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
        if self._asked - set(self._held):
            return []
        return self._decide(now)

    def _decide(self, now: float) -> list[Output]:
        """All survivors have told what they hold: go on, or wait for what is missing."""
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
        plan = self._next_plan()
        holdings = {worker: held.holdings for worker, held in self._held.items()}
        working = {worker: held.working for worker, held in self._held.items()}
        transfers = plan_transfers(self.terms.layout, plan, version, holdings, working)
        unfinished = (record for held in self._held.values() for record in held.unfinished)
        record = next((record for record in unfinished if record.step == version), None)
        told = self._records_held(version)
        exponents = holders[0].exponents[version]
        return resumed + told + self._resume(plan, version, "peers", exponents, transfers, record=record)

    def _records_held(self, version: int) -> list[Output]:
        """What the survivors know of committed steps that their reporter did not live to tell."""
        whole = {record.step: record for held in self._held.values() for record in held.records}
        told = self._stepped_in_order(record for step, record in whole.items() if step <= version)
        # whoever knew what is still missing is gone: better a gap in the log than none of the rest
        for step in sorted(step for step in self._ahead if step <= version):
            told += self._commit(self._ahead.pop(step))
        self._ahead.clear()
        return told

    def _stepped_in_order(self, records: Iterable[StepRecord]) -> list[Output]:
        ordered = sorted(records, key=lambda record: record.step)
        return [output for record in ordered for output in self._stepped(record)]

    def _resume_from_durable(self) -> list[Output]:
        if self.generation == 0:
            self.generation = 1
        plan = self._next_plan()
        if self.durable is None:
            return self._resume(plan, 0, "initial", None, ())
        durable = self.durable
        return self._resume(plan, durable.version, "checkpoint", durable.exponents, (), path=durable.path)

    def _chosen(self) -> list[WorkerId]:
        """The members that work is to be divided among: those who stay, no more than there is work for,
        and whoever has work keeps it. Where too few stay, those with a notice work until they are gone."""
        staying = [worker for worker in sorted(self.members) if worker not in self._notices]
        if len(staying) < self.terms.min_workers:
            staying = sorted(self.members)
        at_work = set(self.plan.workers) if self.plan else set()
        staying.sort(key=lambda worker: (worker not in at_work, worker))
        limit = max(self.terms.max_workers or 0, self.terms.workers)
        return sorted(staying if self.terms.max_workers is None else staying[:limit])

    def _planning_members(self) -> list[Member]:
        return [replace(self.members[w], speed=self.speeds.of(w)) for w in self._chosen()]

    def _next_plan(self) -> Plan:
        members = self._planning_members()
        self._considered = frozenset(member.worker for member in members)
        self._weighed = _speeds_of(members)
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
        self._pause = 0.0
        self._unsettled = set(plan.workers)
        taken_back: list[Output] = [TakenBack(version)] if version + 1 < self.next_record else []
        self.next_record = min(self.next_record, version + 1)
        self._ahead.clear()
        if self._incident:
            lost_work = max((held.ages.get(version, 0.0) for held in self._held.values()), default=0.0)
            self._incident.planned(plan.workers, version, source, lost_work)
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
        servers = {transfer.source for transfer in transfers}
        return taken_back + [Send(worker, resume) for worker in sorted({*plan.workers, *servers})]

    # --- at a step boundary -----------------------------------------------------------------

    def _consider(self, now: float) -> list[Output]:
        """Divides the work anew where somebody came or is to leave, unless something is under way."""
        if not self._is_quiet():
            return []
        assert self.plan is not None
        chosen = self._chosen()
        if frozenset(chosen) == self._considered:
            return []
        self._considered = frozenset(chosen)
        plan = self.choose_plan(self.generation + 1, self._planning_members(), self.speeds, self.plan)
        return self._begin_change(plan, "", 0.0, now)

    def _reconsider(self, now: float) -> list[Output]:
        """Divides the work anew where measured speeds promise a gain."""
        if self.plan_gain is None or not self._is_quiet() or self._reached % RECONSIDERED_EVERY:
            return []
        assert self.plan is not None
        members = self._planning_members()
        if _speeds_of(members) == self._weighed:
            return []
        before = dict(self._weighed)
        self._weighed = _speeds_of(members)
        plan = self.choose_plan(self.generation + 1, members, self.speeds, self.plan)
        gain = self.plan_gain(self.plan, plan, members, self.speeds)
        if gain < LEAST_GAIN:
            return []
        changed = [m for m in members if abs(m.speed - before.get(m.worker, 1.0)) > 0.05]
        reason = ", ".join(f"worker {m.worker} at {m.speed:.0%} of the usual speed" for m in changed)
        return self._begin_change(plan, reason or "measured speeds changed", gain, now)

    def _is_quiet(self) -> bool:
        under_way = self._change is not None or bool(self._unsettled)
        recovering = self._incident is not None and not self._incident.over
        ending = self.stopping or bool(self._finished)
        return self.phase is Phase.RUNNING and not (under_way or recovering or ending)

    def _begin_change(self, plan: Plan, reason: str, gain: float, now: float) -> list[Output]:
        assert self.plan is not None
        for worker in set(self._considered) - set(plan.workers):
            notice = _Notice("the others are faster without it", now)
            self._notices.setdefault(worker, notice)
        if same_work(self.plan, plan):
            return self._release(now)
        self.generation = plan.generation
        self._change = PlannedChange(self.plan, plan, reason, gain)
        change = Change(
            plan,
            {worker: self._addresses[worker] for worker in self._change.concerned},
            boundary_transfers(self.terms.layout, self.plan, plan),
            self.terms.steps,
            usher=self.plan.workers[0],
        )
        return [Send(worker, change) for worker in self._change.concerned]

    def _moved(self, report: Moved, now: float) -> list[Output]:
        if report.generation != self.generation:
            return []
        change = self._change
        if change is not None:
            if not change.begun:
                self.plan = change.new
                self._unsettled = set(change.new.workers)
            change.moved(report.worker, report.seconds, report.bytes_received)
            return self._finish_change(now)
        incident = self._incident
        if incident is None or incident.over:
            return []
        incident.moved(report.worker, report.bytes_received, now)
        return [Note(incident.recovered()), *self._consider(now)] if incident.over else []

    def _settled(self, worker: WorkerId, generation: int, now: float) -> list[Output]:
        if generation != self.generation:
            return []
        if self._change is not None:
            self._change.settled(worker)
            self._unsettled.discard(worker)
            return self._finish_change(now)
        self._unsettled.discard(worker)
        if self._unsettled:
            return []
        return self._release(now) + self._consider(now)

    def _finish_change(self, now: float) -> list[Output]:
        change = self._change
        assert change is not None
        if not change.over:
            return []
        self._change = None
        self._pause = change.pause
        count = len(change.old.workers) - len(change.leaving)
        outputs: list[Output] = []
        for worker in change.joining:
            step, count = self._reached + 1, count + 1
            outputs.append(Note(WorkerJoined(step, worker, count - 1, count, change.pause)))
        if not change.joining and not change.leaving:
            rebalanced = Rebalanced(
                self._reached + 1, change.reason, change.gain, change.pause, change.moved_bytes
            )
            outputs.append(Note(rebalanced))
        return outputs + self._release(now) + self._consider(now)

    # --- a controller that was started anew ---------------------------------------------------

    def _begin_learning(self, event: Learn, now: float) -> list[Output]:
        assert self.phase is Phase.FORMING and not self.members, "only a fresh controller has to learn"
        self._learning_since = now
        self.phase = Phase.LEARNING
        self._learn = event
        self._asked = set(event.workers)
        self._hiring.next_worker = max(event.next_worker, self._hiring.next_worker)
        self.next_record = event.recorded + 1
        return self._conclude_if_learned(now)

    def _learned(self, here: Here, now: float) -> list[Output]:
        if self.phase is not Phase.LEARNING or here.worker not in self._asked:
            return []
        self._here[here.worker] = here
        return self._conclude_if_learned(now)

    def _conclude_if_learned(self, now: float) -> list[Output]:
        if self._asked - set(self._here):
            return []
        assert self._learn is not None
        answers = {worker: here for worker, here in self._here.items() if worker in self._asked}
        for here in answers.values():
            self._admit(here)
        found = standing(answers)
        self.generation, self.plan = found.generation, found.plan
        if found.plan is None:
            self.phase = Phase.FORMING
            self._fenced.update(set(range(self.terms.workers)) - set(self.members))
            return self._form_if_complete(now)
        self._reached = found.version
        self._considered = frozenset(found.plan.workers)
        records = {record.step: record for here in answers.values() for record in here.records}
        outputs: list[Output] = [
            Note(ControllerRestarted(found.version + 1, len(found.plan.workers), self._learn.away))
        ]
        outputs += self._stepped_in_order(records.values())
        self.phase = Phase.RUNNING
        for report in self._early:
            if report.worker in self.members:
                outputs += self._report(report, now)
        self._early.clear()
        if self.phase is not Phase.RUNNING:
            return outputs
        if found.undisturbed:
            return outputs + self._hire(now) + self._consider(now)
        incident = Incident(found.version + 1, len(found.plan.workers), began=now)
        for worker in found.missing:
            self._fenced.add(worker)
            incident.lose(worker, "lost while the controller was away", now, died_at=None)
            outputs.append(Note(WorkerLost(found.version + 1, worker, "lost while the controller was away")))
        self._incident = incident if found.missing else None
        return outputs + self._interrupt(now) + self._hire(now)

    # --- progress ---------------------------------------------------------------------------

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

    def _stop(self, now: float) -> list[Output]:
        if self.stopping:
            return []
        self.stopping = True
        if self.phase in (Phase.FORMING, Phase.LEARNING):
            return self._end("interrupted", "stopped before the first step")
        if self.phase is Phase.PAUSED:
            if self.members:
                return self._decide(now)
            return self._end("interrupted", "stopped while there was no worker")
        return [Send(worker, Stop()) for worker in sorted(self.members)]

    def _end_if_finished(self) -> list[Output]:
        if self.plan is None or self.phase is not Phase.RUNNING:
            return []
        if not set(self.plan.workers) <= set(self._finished):
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

    def _end(self, outcome: Literal["completed", "interrupted", "failed"], message: str) -> list[Output]:
        self.phase = Phase.ENDED
        leaving: list[Output] = [Send(worker, Leave(message)) for worker in sorted(self.members)]
        return [*leaving, End(outcome, message)]


def _speeds_of(members: Sequence[Member]) -> tuple[tuple[WorkerId, float], ...]:
    """Coarse enough that noise does not count as a change."""
    return tuple((member.worker, round(member.speed, 1)) for member in members)
