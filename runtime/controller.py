"""The controller: events in, commands and notes out. It does no I/O and reads no clock.

Workers run step after step by themselves; the controller acts only when something happens. Whoever
drives it (a Ray actor, a test, a simulation) passes in every event with the time at which it came.

Two roads lead to a new plan. After a loss everybody is interrupted, tells what it holds, and goes on from
the newest step that is complete (``_interrupt``, ``_decide``). For a join, a notice or a slow worker the
others are told of the new plan while they train, and go over to it at a step boundary (``_consider``).
"""

from __future__ import annotations

from runtime.control.recovery import Recovery
from runtime.control.state import Notice, Phase
from runtime.events import (
    CheckpointSkipped,
    ControllerRestarted,
    DemandCapped,
    DrainNotice,
    FaultInjected,
    RunStarted,
    StepRepeated,
    WorkerLost,
)
from runtime.incident import Incident
from runtime.learning import standing
from runtime.plan import WorkerId
from runtime.protocol import (
    Beat,
    Failing,
    Finished,
    Heard,
    Held,
    Here,
    Injecting,
    Leave,
    Leaving,
    Linked,
    Measured,
    Moved,
    PeerLost,
    Probe,
    Repeated,
    Report,
    Settled,
    Stepped,
    Stop,
    Unwritten,
    Written,
)
from runtime.signals import (
    CommandsSent,
    Dismiss,
    Drain,
    Input,
    Joined,
    Learn,
    Lost,
    ManifestFailed,
    ManifestWritten,
    Note,
    Output,
    Resize,
    Send,
    StopRequested,
    Tick,
)

PROBE_SECONDS = 0.5
"""How long greetings between workers may take, where nothing moves any more."""

GREETING_SECONDS = 0.01
"""How long they may take for each peer, where that is more: one that was never spoken to is dialled first."""

LEARNING_SECONDS = 5.0
"""How long workers may take to tell a new controller where they stand."""


class Controller(Recovery):
    """The transitions. ``handle`` is the only entry."""

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
            case Resize(workers):
                return self._resize(workers, now)
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
            case Linked():
                self.speeds.link(report)
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

    def _joined(self, event: Joined, now: float) -> list[Output]:
        if event.worker in self._fenced:
            return [Dismiss(event.worker)]  # it was no longer wanted while it was on its way
        self._hiring.arrived(event.worker)
        self._admit(event)
        self._watch.begin(event.worker, now)
        if self.phase is Phase.FORMING:
            return self._form_if_complete(now)
        if self.phase is Phase.PAUSED:
            return self._decide(now)
        return self._consider(now)

    def _form_if_complete(self, now: float) -> list[Output]:
        if len(self.members) + len(self._fenced) + len(self._hiring.starting) < self.terms.workers:
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
        return [Note(started), *self._capped(), *resuming, *self._hire(now)]

    def _capped(self) -> list[Output]:
        """Says so where fewer are asked for than the recipe allows."""
        most, useful = self.terms.max_workers, self.terms.useful
        if self.aim is not None or most is None or useful is None or useful >= most:
            return []
        return [Note(DemandCapped(self._reached, useful, most))]

    def _lost(self, worker: WorkerId, reason: str, now: float, confirmed: bool = True) -> list[Output]:
        if confirmed and worker in self._out_of_reach:
            self._out_of_reach.discard(worker)
            if self._incident is not None:
                self._incident.explain(worker, reason)
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
        self.speeds.forget(worker)
        self._disputes.forget(worker)
        if not confirmed:
            self._out_of_reach.add(worker)
        outputs: list[Output] = [
            Note(WorkerLost(self._reached + 1, worker, reason, idle=not (was_member and had_part))),
            Dismiss(worker),
        ]
        died_at = self._died_at.pop(worker, None)
        if self._addresses.pop(worker, None) is not None:
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
        if not self.members and self._most is None:
            return outputs + self._end("failed", "every worker was lost: start again with --resume")
        incident = self._incident
        if incident is None or incident.over:
            at_work = set(self.plan.workers if self.plan else ()) & {worker, *self.members}
            incident = Incident(self._reached + 1, len(at_work), began=now)
        incident.lose(worker, reason, now, died_at=died_at)
        self._incident = incident
        return outputs + self._interrupt(now) + self._hire(now)

    def _drain(self, worker: WorkerId, reason: str, deadline: float | None, now: float) -> list[Output]:
        if worker not in self.members or worker in self._notices:
            return []
        self._notices[worker] = Notice(reason, now)
        outputs: list[Output] = [Note(DrainNotice(self._reached + 1, worker, reason, deadline))]
        if self.phase in (Phase.FORMING, Phase.LEARNING):
            return outputs
        return outputs + self._hire(now) + self._release(now) + self._consider(now)

    def _tick(self, now: float) -> list[Output]:
        self._watch.tick(now)
        outputs: list[Output] = []
        if self.phase is Phase.LEARNING and now - self._learning_since > LEARNING_SECONDS:
            for worker in sorted(self._asked - set(self._here)):
                outputs += self._lost(worker, "did not answer a new controller", now, confirmed=False)
        if self.phase is Phase.AGREEING:
            for worker in self._watch.late(self._asked - set(self._held), self._asked_at, now):
                outputs += self._lost(worker, "did not say what it holds", now, confirmed=False)
        for worker, reason in self._watch.overdue(now, self._median_step()):
            outputs += self._lost(worker, reason, now, confirmed=False)
        for worker in self._disputes.due(now, self.members, self._watch.heard_since):
            outputs += self._lost(worker, "cut off from other workers", now, confirmed=False)
        if self.phase is Phase.RUNNING and self._watch.stalled(now, self._median_step()):
            outputs += self._probe(now)
        waits_for = self._cut_off and now - self._cut_off_at > self.terms.patience.silence_seconds
        if self.phase is Phase.PAUSED and waits_for and self._paused_at is None:
            self._paused_at = self._cut_off_at
            outputs.append(Note(self._paused()))
        return outputs + self._hire(now)

    def _probe(self, now: float) -> list[Output]:
        """Everybody waits for something that is lost; but at the end, for the last checkpoint only."""
        assert self.plan is not None
        self._watch.stirred(now)
        if set(self.plan.workers) <= set(self._finished):
            return []
        self._probes += 1
        peers = self.plan.workers
        probe = Probe(self._probes, peers, max(PROBE_SECONDS, GREETING_SECONDS * len(peers)))
        return [Send(worker, probe) for worker in peers if worker in self.members]

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
            self._watch.begin(here.worker, now)
        found = standing(answers)
        self.generation, self.plan = found.generation, found.plan
        if found.generation == 0 and self._learn.recorded == 0:  # the run had not begun
            self.phase = Phase.FORMING
            self._fenced.update(set(range(self.terms.workers)) - set(self.members))
            if self.stopping:
                return self._end("interrupted", "stopped before the first step")
            return self._form_if_complete(now)
        at_work = found.plan.workers if found.plan else ()  # only newcomers may be left
        self._reached = version = found.version if found.plan else self._learn.recorded
        self._considered = frozenset(at_work)
        records = {record.step: record for here in answers.values() for record in here.records}
        outputs: list[Output] = [Note(ControllerRestarted(version + 1, len(at_work), self._learn.away))]
        outputs += self._stepped_in_order(records.values()) + self._past_gaps(version)
        self.phase = Phase.RUNNING
        self._unsettled = {w for w in at_work if w in answers and not answers[w].settled}
        if not found.undisturbed:
            incident = Incident(version + 1, len(at_work), began=now)
            reason = "lost while the controller was away"
            for worker in found.missing:
                self._fenced.add(worker)
                incident.lose(worker, reason, now, died_at=None)
                outputs.append(Note(WorkerLost(version + 1, worker, reason)))
            self._incident = incident if found.missing else None
            outputs += self._interrupt(now)
        early, self._early = self._early, []
        for report in early:  # only now: what they ask for must not go out to workers that are gone
            if report.worker in self.members:
                outputs += self._report(report, now)
        if self.phase is Phase.ENDED:
            return outputs
        if self.stopping:
            outputs += [Send(worker, Stop()) for worker in sorted(self.members)]
        return outputs + self._hire(now) + self._consider(now)

    def _stop(self, now: float) -> list[Output]:
        if self.stopping:
            return []
        self.stopping = True
        if self.phase is Phase.FORMING:
            return self._end("interrupted", "stopped before the first step")
        if self.phase is Phase.LEARNING:
            return []  # they are told once it is known who is there
        if self.phase is Phase.PAUSED:
            if self.members:
                return self._decide(now)
            return self._end("interrupted", "stopped while there was no worker")
        return [Send(worker, Stop()) for worker in sorted(self.members)]
