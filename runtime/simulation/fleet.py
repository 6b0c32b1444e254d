"""Thousands of workers as one: the real controller and planner decide, the workers' answers are worked out.

No message is simulated here. All workers of a plan step together, and answer the controller together; what
they hold follows from the plan. What the controller's decisions take is measured with a real clock and
passes on the simulated one, so that goodput counts it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

from runtime.controller import Controller, Phase
from runtime.events import StepRecord
from runtime.plan import Member, Plan, WorkerId
from runtime.protocol import Change, Held, Interrupt, Moved, Resume, Settled, Stepped
from runtime.resharding import Holding, Transfer
from runtime.signals import (
    CommandsSent,
    Committed,
    Dismiss,
    Drain,
    Hire,
    Input,
    Joined,
    Lost,
    Output,
    PlanChooser,
    Send,
    TakenBack,
    Tick,
)
from runtime.simulation.checks import Violation, check_plan
from runtime.simulation.clock import Clock
from runtime.simulation.fleet_report import FleetReport, FleetSettings
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
        self._controller = Controller(settings.terms, self._choose)
        self._nodes = -(-settings.terms.workers // settings.workers_per_node)
        self._node_of: dict[WorkerId, int] = {}
        self._alive: set[WorkerId] = set()
        self._gone_nodes: set[int] = set()
        self._free: list[int] = []
        self._wanted: list[WorkerId] = []
        self._plan: Plan | None = None
        self._kept: dict[WorkerId, list[tuple[int, int, int]]] = {}
        self._version = 0
        self._run = 0  # counts uninterrupted stretches: what belongs to an older one is void
        self._step_began = 0.0
        self._pending: Change | None = None
        self._lost_at: float | None = None
        for entry in trace:
            self._clock.at(entry.time, partial(self._befall, entry))

    def _choose(
        self, generation: int, members: Sequence[Member], speeds: Speeds, previous: Plan | None
    ) -> Plan:
        began = time.perf_counter()
        plan = self._chooser(generation, members, speeds, previous)
        self.report.planning.append(time.perf_counter() - began)
        domains = {member.worker: member.domain for member in members}
        check_plan(self.settings.terms.layout, plan, self.settings.micro_batches, domains)
        return plan

    def play(self, seconds: float) -> FleetReport:
        """Runs for ``seconds`` of simulated time."""
        for worker in range(self.settings.terms.workers):
            self._join(worker, worker // self.settings.workers_per_node)
        self._clock.after(1.0, self._tick)
        while self._clock.now < seconds:
            if self._controller.phase is Phase.ENDED:
                raise Violation(f"the run ended after {self._clock.now:.0f} s")
            self._clock.step()
        self.report.seconds = seconds
        return self.report

    # --- the cluster ------------------------------------------------------------------------

    def _befall(self, entry: Entry) -> None:
        node = int(entry.node * self._nodes)
        here = sorted(worker for worker in self._alive if self._node_of[worker] == node)
        match entry.event:
            case "notice":
                for worker in here:
                    self._tell(Drain(worker, "spot notice", NOTICE_SECONDS))
            case "lost":
                self._gone_nodes.add(node)
                self._free = [place for place in self._free if place != node]
                if here:
                    self._lose(here)
            case "back" if node in self._gone_nodes:
                self._gone_nodes.discard(node)
                self._free += [node] * (self.settings.workers_per_node - len(here))
                self._place()

    def _lose(self, workers: list[WorkerId]) -> None:
        self.report.lost_nodes += 1
        self.report.lost_workers += len(workers)
        self._alive -= set(workers)
        at_work = self._plan is not None and not set(workers).isdisjoint(self._plan.workers)
        if at_work and self._lost_at is None:
            self._lost_at = self._clock.now
        if at_work:
            self._run += 1
        for worker in workers:
            self._clock.after(
                self.settings.detect_seconds, partial(self._tell, Lost(worker, "node lost", confirmed=True))
            )

    def _join(self, worker: WorkerId, node: int) -> None:
        if node in self._gone_nodes:
            return
        self._node_of[worker] = node
        self._alive.add(worker)
        layers, seconds = self.settings.terms.layout.layers, self.settings.layer_seconds
        profile = (seconds,) * layers, (2 * seconds,) * layers
        self._tell(Joined(worker, f"node-{node}", f"simulated:{worker}", *profile))

    def _place(self) -> None:
        """Starts workers that were asked for where there is room."""
        while self._wanted and self._free:
            worker, node = self._wanted.pop(0), self._free.pop(0)
            self.report.joined += 1
            self._clock.after(self.settings.warm_up_seconds, partial(self._join, worker, node))

    def _tick(self) -> None:
        self._tell(Tick())
        self._clock.after(1.0, self._tick)

    # --- the controller ---------------------------------------------------------------------

    def _tell(self, event: Input) -> None:
        began = time.perf_counter()
        outputs = self._controller.handle(event, self._clock.now)
        took = time.perf_counter() - began
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

    def _carry_out(self, output: Output) -> None:
        match output:
            case Hire(worker):
                self._wanted.append(worker)
                self._place()
            case Dismiss(worker):
                if worker in self._alive:
                    self._alive.discard(worker)
                    self.report.released += 1
                    if self._node_of[worker] not in self._gone_nodes:
                        self._clock.after(NOTICE_SECONDS, partial(self._room, self._node_of[worker]))
            case Committed():
                self.report.steps += 1
            case TakenBack(version):
                self.report.taken_back += max(0, self.report.steps - version)
                self.report.steps = version

    def _room(self, node: int) -> None:
        if node not in self._gone_nodes:
            self._free.append(node)
            self._place()

    def _answer(self, generation: int) -> None:
        """All survivors tell what they hold: the last two versions of what the last plan gave them."""
        versions = [version for version in (self._version - 1, self._version) if version >= 0]
        blocks = self._blocks_of_stage()
        exponents = {version: (version,) if version else None for version in versions}
        for worker in sorted(self._controller.members):
            if self._controller.generation != generation or self._controller.phase is not Phase.AGREEING:
                return
            pieces = self._kept.get(worker, ())
            holdings = tuple(Holding(*piece, version) for piece in pieces for version in versions)
            working = dict.fromkeys(blocks.get(worker, ()), self._version)
            ages = dict.fromkeys(versions, self._clock.now - self._step_began)
            self._tell(Held(worker, generation, holdings, working, exponents, ages))

    def _blocks_of_stage(self) -> dict[WorkerId, tuple[int, ...]]:
        if self._plan is None:
            return {}
        layout = self.settings.terms.layout
        return {
            worker: tuple(block.index for block in layout.blocks_of(stage.first, stage.stop))
            for stage in self._plan.stages
            for worker in stage.workers
        }

    # --- the workers ------------------------------------------------------------------------

    def _resume(self, resume: Resume, took: float) -> None:
        if self._lost_at is not None:
            self.report.recoveries += 1
        self.report.repeated_steps += self._version - resume.version
        self._version = resume.version
        self._run += 1
        self._go_over(resume.plan, resume.transfers, took, self._run)

    def _go_over(self, plan: Plan, transfers: Iterable[Transfer], delay: float, run: int) -> None:
        """Everybody moves to ``plan``; what has moved is told when it has."""
        self._plan = plan
        self._kept = {}
        for shard in plan.shards:
            for keeper in (shard.owner, shard.backup):
                if keeper is not None:
                    self._kept.setdefault(keeper, []).append((shard.block, shard.start, shard.stop))
        moving: Counter[WorkerId] = Counter()
        for transfer in transfers:
            moving[transfer.source] += transfer.bytes
            moving[transfer.target] += transfer.bytes
        seconds = max(moving.values(), default=0) / self.settings.link_bytes_per_second
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
        self._clock.after(self._step_seconds(self._plan), partial(self._stepped, self._run))

    def _step_seconds(self, plan: Plan) -> float:
        """The busiest worker's micro-batches, and the pipeline's ramp."""
        times = [3 * self.settings.layer_seconds * (stage.stop - stage.first) for stage in plan.stages]
        busiest = [max(Counter(row).values()) for row in plan.assignment]
        steady = max(taken * count for taken, count in zip(times, busiest, strict=True))
        return steady + sum(times) - max(times)

    def _stepped(self, run: int) -> None:
        if run != self._run:
            return
        assert self._plan is not None
        plan, took = self._plan, self._clock.now - self._step_began
        self._version += 1
        self.report.productive += took
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
        change = self._pending
        if change is None:
            self._begin_step()
            return
        self._pending = None
        self.report.changes += 1
        self._go_over(change.plan, change.transfers, 0.0, run)
