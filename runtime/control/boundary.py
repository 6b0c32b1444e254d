"""Changes of plan at a step boundary: newcomers, leavers, slow workers. Nobody is interrupted."""

from __future__ import annotations

from runtime.change import PlannedChange, boundary_transfers, same_work
from runtime.control.progress import Progress
from runtime.control.state import Notice, Phase, speeds_of
from runtime.events import (
    DrainNotice,
    Rebalanced,
    Resized,
    WorkerJoined,
    WorkerLeft,
)
from runtime.plan import Plan, WorkerId
from runtime.protocol import (
    Change,
    Leave,
    Moved,
)
from runtime.signals import (
    Dismiss,
    Note,
    Output,
    Send,
)
from runtime.sizing import problem_of_size, surplus

RECONSIDERED_EVERY = 8
"""Steps between two looks at whether measured speeds ask for another division of work."""

LEAST_GAIN = 0.05
"""Predicted relative gain in speed below which the work is not divided anew."""


class Boundary(Progress):
    """Orders a change while everybody trains, and follows it until it is over."""

    def _consider(self, now: float) -> list[Output]:
        """Divides the work anew where somebody came or is to leave, unless something is under way."""
        if not self._is_quiet():
            return []
        assert self.plan is not None
        told = self._trim(now)
        if told:
            told += self._release(now)
        chosen = self._chosen()
        if frozenset(chosen) == self._considered:
            return told
        self._considered = frozenset(chosen)
        plan = self.choose_plan(self.generation + 1, self._planning_members(), self.speeds, self.plan)
        return told + self._begin_change(plan, "the members changed", 0.0, now)

    def _resize(self, workers: int, now: float) -> list[Output]:
        """Aims for ``workers`` from now on: asks for more, or has some leave at the next step boundary."""
        terms = self.terms
        problem = problem_of_size(workers, terms.min_workers, terms.workers, terms.max_workers)
        assert problem is None, problem
        if self.stopping or workers == self.aim:
            return []
        self.aim = workers
        self._hiring.wanted = workers + terms.spares
        outputs: list[Output] = [Note(Resized(self._reached + 1, workers))]
        if self.phase in (Phase.FORMING, Phase.LEARNING):
            return outputs
        for worker in self._hiring.unwanted(len(self.members) - len(self._notices)):
            self._fenced.add(worker)
            outputs.append(Dismiss(worker))
        return outputs + self._trim(now) + self._hire(now) + self._release(now) + self._consider(now)

    def _trim(self, now: float) -> list[Output]:
        """Has those leave that are more than a person wants."""
        if self.aim is None:
            return []
        staying = {w: member.domain for w, member in self.members.items() if w not in self._notices}
        at_work = set(self.plan.workers) if self.plan else set()
        reason = f"the run was resized to {self.aim}"
        outputs: list[Output] = []
        for worker in surplus(staying, at_work, self.aim + self.terms.spares):
            self._notices[worker] = Notice(reason, now)
            outputs.append(Note(DrainNotice(self._reached + 1, worker, reason)))
        return outputs

    def _reconsider(self, now: float) -> list[Output]:
        """Divides the work anew where measured speeds promise a gain."""
        if self.plan_gain is None or not self._is_quiet() or self._reached % RECONSIDERED_EVERY:
            return []
        assert self.plan is not None
        members = self._planning_members()
        if speeds_of(members) == self._weighed:
            return []
        before = dict(self._weighed)
        self._weighed = speeds_of(members)
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
        left_out = set(self._considered) - set(plan.workers)
        for worker in left_out if len(plan.workers) >= self.terms.min_workers else ():  # else kept in reserve
            notice = Notice("the others are faster without it", now)
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
                self._unsettled = change.owed  # some may settle before anybody is under way
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

    def _release(self, now: float) -> list[Output]:
        """Lets go of those who are to leave and are no longer needed."""
        if self.phase is not Phase.RUNNING or self._unsettled or self._change is not None:
            return []
        assert self.plan is not None
        outputs: list[Output] = []
        # after a loss in mid-step the plan has only those who finish the step: others are missing at its end
        for worker in sorted(set(self._notices) - {*self.plan.workers, *self._chosen()}):
            notice = self._notices.pop(worker)
            del self.members[worker]
            self._fenced.add(worker)
            self._watch.forget(worker)
            self.speeds.forget(worker)
            del self._addresses[worker]
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
