"""A whole simulated run: controller, workers, network, machines, storage, and whatever befalls them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from random import Random

from runtime.control.state import Phase
from runtime.controller import Controller
from runtime.plan import CONTROLLER, Plan, WorkerId
from runtime.signals import (
    Drain,
    Joined,
    Learn,
    Lost,
    Resize,
    StopRequested,
    Terms,
)
from runtime.simulation.checks import Checks, Violation
from runtime.simulation.clock import Clock
from runtime.simulation.control import NEVER, SimJob
from runtime.simulation.host import SimHost
from runtime.simulation.journal import Journal
from runtime.simulation.network import Network
from runtime.simulation.process import Process
from runtime.simulation.settings import Planner, Settings
from runtime.simulation.storage import Record, Storage
from runtime.simulation.toy import ToyStore, reference
from runtime.simulation.worker import SimWorker

ATTACH_SECONDS = 2.0
"""How long a new controller waits for a worker's answer."""


class SimCluster:
    """Runs ``settings`` under a clock of its own; equal seeds give equal runs."""

    def __init__(
        self, settings: Settings, planner: Planner, seed: int, journal: Journal | None = None
    ) -> None:
        self.settings, self.journal = settings, journal
        self.random = Random(seed)
        self.clock = Clock()
        self.network = Network(self.clock, self.random)
        self.storage, self.record = Storage(), Record()
        self.workers: dict[WorkerId, SimWorker] = {}
        self.domains: dict[WorkerId, str] = {}
        self.interrupts = self.salvaged_micro_batches = 0
        self.on_point: Callable[[WorkerId, str], bool] = lambda worker, point: False
        """Told of every place that a worker reaches; injects a fault there and says so, or does not."""
        self._reference = reference(settings.model)
        self._stores: dict[WorkerId, ToyStore] = {}
        self.checks = Checks(self._reference, self.domains, self._stores, settings.min_workers)
        self._job = SimJob(
            settings.model,
            settings.steps,
            settings.checkpoint_every,
            salvage=settings.salvage,
            split_backward=settings.split_backward,
        )
        self._chooser, self._gain, self._mender = planner(
            settings.model.layout,
            settings.model.micro_batches,
            settings.stages,
            settings.chunks,
            settings.model.cut,
        )
        self._hosts = 0
        self._aim: int | None = None
        """How many workers somebody has asked for; it is on record."""
        self._highest = len(settings.domains) - 1
        """The highest id that any worker was given; it is on record."""
        self.host = self._start_host(len(settings.domains))
        for worker, domain in enumerate(settings.domains):
            self.clock.after(self.random.uniform(0.0, 0.2), partial(self._start_worker, worker, domain))

    # --- starting ---------------------------------------------------------------------------

    def _start_host(self, next_worker: WorkerId) -> SimHost:
        settings = self.settings
        terms = Terms(
            run="simulated",
            layout=settings.model.layout,
            steps=settings.steps,
            workers=len(settings.domains),
            min_workers=settings.min_workers,
            start=self.storage.newest,
            max_workers=settings.max_workers,
            spares=settings.spares,
            next_worker=next_worker,
            aim=self._aim,
            patience=settings.patience,
        )
        mender = self._mender if settings.salvage else None
        controller = Controller(terms, self._chooser, self._gain, mender)
        identity = CONTROLLER - self._hosts
        self._hosts += 1
        process = Process(self.clock, self.random)
        parts = (self.network, self, self.storage, self.record, self.checks)
        return SimHost(identity, controller, process, *parts, self.journal)

    def _start_worker(self, worker: WorkerId, domain: str) -> None:
        process = Process(self.clock, self.random)
        process.on_end = partial(self._ended, worker)
        self.domains[worker] = domain
        started = SimWorker(
            worker, self._job, domain, process, self.network, self.storage, self._reference, self
        )
        self.workers[worker], self._stores[worker] = started, started.store
        started.follow(self.host.identity)
        layers, seconds = self.settings.model.layout.layers, self._job.layer_seconds
        address = f"simulated:{worker}"
        self.host.post(Joined(worker, domain, address, (seconds,) * layers, (2 * seconds,) * layers))

    # --- what Ray does ----------------------------------------------------------------------

    def hire(self, worker: WorkerId) -> None:
        """A further worker warms up; now and then that fails."""
        self._highest = max(self._highest, worker)
        host, seconds = self.host, self.random.uniform(0.3, 2.0)
        domains = sorted({*self.domains.values(), f"node-{worker}"})
        domain = self.random.choice(domains)
        fails = self.random.random() < 0.1

        def ready() -> None:
            if host is not self.host or not host.process.alive:
                return  # nobody knows any more what it was for
            if fails:
                host.post(Lost(worker, "could not start"))
            else:
                self._start_worker(worker, domain)

        self.clock.after(seconds, ready)

    def dismiss(self, worker: WorkerId) -> None:
        """Ray ends the process: at once as a rule, late where its machine does not answer."""
        seconds = self.random.choice((0.01, 0.1, 0.5, 3.0))
        self.clock.after(seconds, partial(self._see_off, worker))

    def _see_off(self, worker: WorkerId) -> None:
        if worker in self.workers and self.workers[worker].process.alive:
            self.kill(worker)
        else:
            self._confirm(worker, 0.05)

    def _ended(self, worker: WorkerId) -> None:
        """A worker's process has ended, however."""
        self._confirm(worker, self.random.uniform(0.01, 0.5))

    def _confirm(self, worker: WorkerId, seconds: float) -> None:
        host = self.host
        self.clock.after(seconds, lambda: host.post(Lost(worker, "process died")))

    # --- what workers tell ------------------------------------------------------------------

    def shared(self, worker: WorkerId, plan: Plan, step: int, attempt: int) -> None:
        self.checks.shared(worker, plan, step, attempt)

    def batch(self, step: int, micro_batches: tuple[int, ...]) -> None:
        self.checks.batch(step, micro_batches)

    def committed(self, worker: WorkerId, plan: Plan, step: int) -> None:
        self.checks.committed(worker, plan, step)

    def salvaged(self, worker: WorkerId, micro_batches: int) -> None:
        self.salvaged_micro_batches += micro_batches

    def reached(self, worker: WorkerId, point: str) -> bool:
        return self.on_point(worker, point)

    # --- what may befall them ---------------------------------------------------------------

    @property
    def living(self) -> list[WorkerId]:
        return [worker for worker, each in sorted(self.workers.items()) if each.process.alive]

    def kill(self, worker: WorkerId, *, machine: bool = False) -> None:
        """SIGKILL, or the loss of the machine, which nobody is told of at once."""
        process = self.workers[worker].process
        if process.alive:
            self.checks.lose(worker)
            process.end()
            self.network.die(worker, machine=machine)

    def lose_domain(self, domain: str, *, machine: bool) -> None:
        """Everybody in a failure domain dies; ``machine``: without a word."""
        for worker in self.living:
            if self.domains[worker] == domain:
                self.kill(worker, machine=machine)

    def stop(self, worker: WorkerId, seconds: float) -> None:
        """SIGSTOP, and SIGCONT ``seconds`` later."""
        self.workers[worker].process.stop(seconds)

    def drain(self, worker: WorkerId, deadline: float | None, *, tells_itself: bool) -> None:
        """A notice, from outside or by a signal to the worker; it dies at the deadline."""
        if tells_itself:
            self.workers[worker].process.do(partial(self.workers[worker].notice, "preempted", deadline))
        else:
            self.host.post(Drain(worker, "drained", deadline))
        if deadline is not None:
            self.clock.after(deadline, partial(self.kill, worker))

    def resize(self, workers: int) -> None:
        """Somebody wants so many workers from now on."""
        self._aim = workers
        self.host.post(Resize(workers))

    def cut(
        self, ones: Collection[WorkerId], others: Collection[WorkerId], seconds: float, *, both_ways: bool
    ) -> None:
        """Nothing gets through from ``ones`` to ``others`` for a while; ends are workers or the host."""
        pairs = [(one, other) for one in ones for other in others if one != other]
        self.network.cut(pairs, seconds)
        if both_ways:
            self.network.cut([(other, one) for one, other in pairs], seconds)

    def kill_controller(self, away: float) -> None:
        """The controller's process dies; a new one is there ``away`` seconds later."""
        if not self.host.process.alive or self.host.end is not None:
            return
        self.interrupts += self.host.interrupts
        self.host.process.end()
        self.network.die(self.host.identity, machine=False)
        self.clock.after(away, partial(self._restart_controller, away))

    def _restart_controller(self, away: float) -> None:
        living, next_worker = self.living, self._highest + 1
        if all(self.workers[worker].process.stopped for worker in living):
            for worker in living:  # nobody answers: they are ended, and the run is formed of others
                self.kill(worker)
            self._form_anew(next_worker)
            return
        known = [self.workers[worker].endpoint.generation for worker in living]
        pending = [self.workers[worker].pending_generation() for worker in living]
        self.checks.restarted(max((g for g in [*known, *pending] if g < NEVER), default=0))
        self.host = self._start_host(next_worker)
        self.host.post(Learn(tuple(living), self.record.recorded, away, next_worker))
        for worker in living:
            self.clock.after(self.random.uniform(0.0, 0.05), partial(self._attach, worker, self.host))

    def _form_anew(self, first: WorkerId) -> None:
        """Nobody is left to learn from: the run begins again where the newest checkpoint is."""
        version = 0 if self.storage.newest is None else self.storage.newest.version
        if version < self.record.recorded:
            self.checks.take_back(version)
            self.record.take_back(version)
        self.checks.began_anew(version)
        self._highest = first + len(self.settings.domains) - 1
        self.host = self._start_host(first + len(self.settings.domains))
        for worker, domain in enumerate(self.settings.domains, first):
            self._start_worker(worker, domain)

    def knows_record(self, step: int) -> bool:
        """Whether any living member has the whole record of ``step``. Who was fenced out is not asked."""
        members = self.host.controller.members
        return any(self.workers[worker].has_record(step) for worker in self.living if worker in members)

    def _attach(self, worker: WorkerId, host: SimHost) -> None:
        process = self.workers[worker].process
        answered: list[WorkerId] = []

        def attach() -> None:
            answered.append(worker)
            self.workers[worker].attach(host.identity)

        def late() -> None:
            if not answered:
                host.post(Lost(worker, "did not answer a new controller", confirmed=not process.alive))

        process.do(attach)
        self.clock.after(ATTACH_SECONDS, late)

    def request_stop(self) -> None:
        self.host.post(StopRequested())

    # --- running ----------------------------------------------------------------------------

    @property
    def stranded(self) -> bool:
        """Too few workers are left, and nobody asks for more: the run waits with its state, as it should."""
        controller, settings = self.host.controller, self.settings
        few = len(controller.members) < settings.min_workers
        return controller.phase is Phase.PAUSED and few and settings.max_workers is None

    def run(self, last: float, limit: float) -> None:
        """Runs until the controller ends the run, or, after ``last``, is stranded; Violation where neither
        is so after ``limit`` seconds."""
        while self.host.end is None and not (self.clock.now > last and self.stranded):
            if self.clock.now > limit or not self.clock.step():
                raise Violation(f"no end within {limit:.0f} s: {self.where()}")
        self.interrupts += self.host.interrupts

    def where(self) -> str:
        """In a sentence, where the run stands."""
        controller = self.host.controller
        return (
            f"{controller.phase.value} in generation {controller.generation}, {self.record.recorded} of "
            f"{self.settings.steps} steps recorded, members {sorted(controller.members)}, "
            f"living {self.living}"
        )
