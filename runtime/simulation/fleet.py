"""Thousands of workers as one: the real controller and planner decide, the workers' answers are worked out.

No message is simulated here. All workers of a plan step together, and answer the controller together; what
they hold follows from the plan. What the controller's decisions take is measured (as processor
time, so that a busy machine does not matter) and passes on the simulated clock, so that goodput counts it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from math import inf

from runtime.control.state import Phase
from runtime.controller import Controller
from runtime.detection import Patience
from runtime.events import StepRecord
from runtime.plan import Member, Plan, WorkerId
from runtime.protocol import Change, Held, Interrupt, Moved, Resume, Settled, Stepped
from runtime.resharding import Holding, Transfer
from runtime.signals import (
    CommandsSent,
    Committed,
    Dismiss,
    Drain,
    Durable,
    Hire,
    Input,
    Joined,
    Lost,
    ManifestWritten,
    Output,
    PlanChooser,
    Send,
    TakenBack,
    Tick,
)
from runtime.simulation.checks import Violation, check_plan
from runtime.simulation.clock import Clock
from runtime.simulation.fleet_report import FleetReport, FleetSettings
from runtime.simulation.nodes import Nodes
from runtime.simulation.timing import held_blocks, kept_by, load_seconds, move_seconds, step_seconds
from runtime.simulation.trace import NOTICE_SECONDS, Entry
from runtime.speeds import Speeds

ANSWER_SECONDS = 0.01
"""Until all survivors have told what they hold."""


class Fleet:
    """Plays ``trace`` to a cluster that is formed of all of ``terms.workers`` at time 0."""

    def __init__(self, settings: FleetSettings, chooser: PlanChooser, trace: Sequence[Entry]) -> None:
        self.settings, self.report = settings, FleetReport()
        self._chooser = chooser
        self._clock = Clock()
        # there are no heartbeats here, so nobody is given up for want of them
        terms = replace(settings.terms, patience=Patience(silence_seconds=inf))
        self._controller = Controller(terms, self._choose)
        self._nodes = Nodes(
            -(-settings.terms.workers // settings.workers_per_node), settings.workers_per_node
        )
        self._plan: Plan | None = None
        self._kept: dict[WorkerId, list[tuple[int, int, int]]] = {}
        self._version = 0
        self._seconds_of: list[float] = []  # of every step that still counts
        self._run = 0  # counts uninterrupted stretches: what belongs to an older one is void
        self._step_began = 0.0
        self._checkpoint_began = 0.0
        self._pending: Change | None = None
        self._lost_at: float | None = None
        self._checking = 0.0  # real seconds of the last decision that were the simulation's own
        for entry in trace:
            self._clock.at(entry.time, partial(self._befall, entry))

    def _choose(
        self, generation: int, members: Sequence[Member], speeds: Speeds, previous: Plan | None
    ) -> Plan:
        began = time.thread_time()
        plan = self._chooser(generation, members, speeds, previous)
        self.report.planning.append(time.thread_time() - began)
        began = time.thread_time()
        domains = {member.worker: member.domain for member in members}
        check_plan(self.settings.terms.layout, plan, self.settings.micro_batches, domains)
        self._checking += time.thread_time() - began
        return plan

    def play(self, seconds: float) -> FleetReport:
        """Runs for ``seconds`` of simulated time. Raises Violation where the run ends before."""
        for worker in range(self.settings.terms.workers):
            self._join(worker, worker // self.settings.workers_per_node)
        self._clock.after(1.0, self._tick)
        while self._clock.now < seconds:
            if self._controller.phase is Phase.ENDED:
                raise Violation(f"the run ended after {self._clock.now:.0f} s")
            self._clock.step()
        self.report.seconds, self.report.productive = seconds, sum(self._seconds_of)
        return self.report

    # --- the cluster ------------------------------------------------------------------------

    def _befall(self, entry: Entry) -> None:
        node = int(entry.node * self._nodes.count)
        match entry.event:
            case "notice":
                for worker in self._nodes.on(node):
                    self._tell(Drain(worker, "spot notice", NOTICE_SECONDS))
            case "lost":
                lost = self._nodes.lose(node)
                if lost:
                    self._lose(lost)
            case "back" if self._nodes.is_gone(node):
                self._nodes.come_back(node)
                self._place()

    def _lose(self, workers: list[WorkerId]) -> None:
        self.report.lost_nodes += 1
        self.report.lost_workers += len(workers)
        at_work = self._plan is not None and not set(workers).isdisjoint(self._plan.workers)
        if at_work and self._lost_at is None:
            self._lost_at = self._clock.now
        if at_work:
            self._run += 1
        for worker in workers:
            self._clock.after(self.settings.detect_seconds, partial(self._detect, worker))

    def _detect(self, worker: WorkerId) -> None:
        self._tell(Lost(worker, "node lost", confirmed=True))

    def _join(self, worker: WorkerId, node: int) -> None:
        if self._nodes.is_gone(node):
            return
        self._nodes.start(worker, node)
        layers, seconds = self.settings.terms.layout.layers, self.settings.layer_seconds
        profile = (seconds,) * layers, (2 * seconds,) * layers
        self._tell(Joined(worker, f"node-{node}", f"simulated:{worker}", *profile))

    def _place(self) -> None:
        """Starts workers that were asked for where there is room."""
        for worker, node in self._nodes.placed():
            self.report.joined += 1
            self._clock.after(self.settings.warm_up_seconds, partial(self._join, worker, node))

    def _tick(self) -> None:
        self._tell(Tick())
        self._clock.after(1.0, self._tick)

    # --- the controller ---------------------------------------------------------------------

    def _tell(self, event: Input, before: float = 0.0) -> float:
        """Real seconds that the controller takes for ``event``; it took ``before`` for what led to it."""
        self._checking, began = 0.0, time.thread_time()
        outputs = self._controller.handle(event, self._clock.now)
        took = before + time.thread_time() - began - self._checking
        sends = [output for output in outputs if isinstance(output, Send)]
        resume = next((send.command for send in sends if isinstance(send.command, Resume)), None)
        change = next((send.command for send in sends if isinstance(send.command, Change)), None)
        interrupt = next((send.command for send in sends if isinstance(send.command, Interrupt)), None)
        if resume is not None:
            self._controller.handle(CommandsSent(), self._clock.now + took)
        for output in outputs:
            self._carry_out(output)
        if interrupt is not None:
            self._run += 1
            self._pending = None
            self._clock.after(ANSWER_SECONDS + took, partial(self._answer, interrupt.generation))
        if resume is not None:
            self.report.deciding.append(took)
            self._resume(resume, took)
        if change is not None:
            self.report.deciding.append(took)
            self._pending = change
        return took

    def _carry_out(self, output: Output) -> None:
        match output:
            case Hire(worker):
                self._nodes.ask(worker)
                self._place()
            case Dismiss(worker):
                if worker in self._nodes.living:
                    self._nodes.living.discard(worker)
                    self.report.released += 1
                    self._clock.after(NOTICE_SECONDS, partial(self._room, self._nodes.node_of(worker)))
            case Committed():
                self.report.steps += 1
            case TakenBack(version):
                self.report.taken_back += max(0, self.report.steps - version)
                self.report.steps = version

    def _room(self, node: int) -> None:
        self._nodes.vacate(node)
        self._place()

    def _answer(self, generation: int) -> None:
        """All survivors tell what they hold: the last two versions of what the last plan gave them."""
        versions = [version for version in (self._version - 1, self._version) if version >= 0]
        blocks = {} if self._plan is None else held_blocks(self.settings.terms.layout, self._plan)
        exponents = {version: (version,) if version else None for version in versions}
        took = 0.0
        for worker in sorted(self._controller.members):
            if self._controller.generation != generation or self._controller.phase is not Phase.AGREEING:
                return
            pieces = self._kept.get(worker, ())
            holdings = tuple(Holding(*piece, version) for piece in pieces for version in versions)
            working = dict.fromkeys(blocks.get(worker, ()), self._version)
            ages = dict.fromkeys(versions, self._clock.now - self._step_began)
            took = self._tell(Held(worker, generation, holdings, working, exponents, ages), took)

    # --- the workers ------------------------------------------------------------------------

    def _resume(self, resume: Resume, took: float) -> None:
        if self._lost_at is not None:
            self.report.recoveries += 1
        self.report.repeated_steps += self._version - resume.version
        self._version = resume.version
        del self._seconds_of[self._version :]
        if resume.source == "checkpoint":
            self.report.from_checkpoint += 1
        self._run += 1
        self._go_over(resume.plan, resume.transfers, took, self._run, from_storage=resume.source != "peers")

    def _go_over(
        self, plan: Plan, transfers: Iterable[Transfer], delay: float, run: int, *, from_storage: bool = False
    ) -> None:
        """Everybody moves to ``plan``; what has moved is told when it has."""
        self._plan = plan
        self._kept = kept_by(plan)
        if from_storage:
            seconds = load_seconds(self._kept.values(), self.settings)
        else:
            seconds = move_seconds(transfers, self.settings)
        workers = len(plan.workers)
        self.report.least_workers = min(self.report.least_workers or workers, workers)
        self._clock.after(delay + seconds, partial(self._moved, plan, run, seconds))

    def _moved(self, plan: Plan, run: int, seconds: float) -> None:
        for worker in plan.workers:
            if run == self._run:
                self._tell(Moved(worker, plan.generation, seconds, 0))
        if run == self._run and self._lost_at is not None:
            self.report.recovery_seconds.append(self._clock.now - self._lost_at)
            self._lost_at = None
        for worker in plan.workers:
            if run == self._run:
                self._tell(Settled(worker, plan.generation))
        if run == self._run:
            self._begin_step()

    def _begin_step(self) -> None:
        assert self._plan is not None
        self._step_began = self._clock.now
        self._clock.after(step_seconds(self._plan, self.settings), partial(self._stepped, self._run))

    def _stepped(self, run: int) -> None:
        if run != self._run:
            return
        assert self._plan is not None
        plan, took = self._plan, self._clock.now - self._step_began
        self._version += 1
        self._seconds_of.append(took)
        record = StepRecord(
            step=self._version,
            loss=0.0,
            grad_norm=0.0,
            learning_rate=0.0,
            samples=self.settings.micro_batches,
            tokens=0,
            seconds=took,
            workers=len(plan.workers),
            generation=plan.generation,
            fingerprint=0,
        )
        self._tell(Stepped(plan.workers[0], record))
        if run != self._run:
            return
        self._checkpoint_if_due()
        change = self._pending
        if change is None:
            self._begin_step()
            return
        self._pending = None
        self.report.changes += 1
        self._go_over(change.plan, change.transfers, 0.0, run)

    def _checkpoint_if_due(self) -> None:
        """Checkpoints are written behind the training's back, and are whole once their parts are."""
        every, taking = self.settings.checkpoint_seconds, self.settings.checkpoint_write_seconds
        if self._clock.now - self._checkpoint_began < every:
            return
        self._checkpoint_began = self._clock.now
        durable = Durable(self._version, "simulated", (self._version,))
        self._clock.after(taking, partial(self._written, durable))

    def _written(self, durable: Durable) -> None:
        if durable.version <= self._version:
            self._tell(ManifestWritten(durable))
