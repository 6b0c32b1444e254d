"""A whole run in one process: the real controller and workers, as threads on the in-process fabric."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from actors.host import Host, steady_time
from actors.planning import plan_chooser, plan_mender, salvageable, searched_planners
from actors.recorder import Recorder
from actors.worker import Worker
from runtime.controller import Controller
from runtime.detection import Patience
from runtime.events import Event, StepRecord
from runtime.fabric.inprocess import InProcessFabric
from runtime.fabric.interface import EndpointClosed
from runtime.goodput import Ledger
from runtime.metrics import Metrics
from runtime.plan import CONTROLLER, Strategy
from runtime.protocol import Leave
from runtime.run_folder import RunFolder
from runtime.signals import Durable, Joined, Learn, Lost, PlanGain, Terms
from strategies.boundary import Value, flatten
from strategies.job import Fault, Job
from strategies.model import Model
from strategies.options import OptimizerSettings
from strategies.profile import Profile
from strategies.sequence.teams import Teaming
from strategies.shardings.registry import SHARDINGS
from tests.support.models import Tokens, build

OPTIMIZER = OptimizerSettings(learning_rate=3e-2, warmup_steps=2, decay_steps=8, clip_norm=0.5)


PATIENCE = Patience(silence_seconds=30.0, stuck_seconds=30.0)
"""Threads of one process wait for one another; only tests of detection are in a hurry."""


class Killed(BaseException):
    """Ends a worker's thread the way SIGKILL ends its process."""


def toy_job(folder: Path, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "build_model": build,
        "build_data": partial(Tokens, 5),
        "seed": 7,
        "steps": 5,
        "micro_batches": 5,
        "micro_batch_size": 2,
        "optimizer": OPTIMIZER,
        "checkpoint_root": str(folder / "checkpoints"),
        "tokens_per_sample": 5,
    }
    return Job(**{**values, **changes})


@dataclass
class Result:
    steps: tuple[StepRecord, ...]
    events: tuple[Event, ...]
    outcome: str | None
    message: str
    durable: Durable | None = None

    @property
    def bits(self) -> list[tuple[float, float, int]]:
        """What must not depend on who computed it."""
        return [(record.loss, record.grad_norm, record.fingerprint) for record in self.steps]


_MEASURED: dict[Any, Profile] = {}
"""By all that a warm-up depends on."""


class LikeTheFirst(Worker):
    """Has the model of an earlier worker in the same process: takes over what that one measured, which is a
    quarter of a short run's time."""

    def _measure(self, model: Model, inputs: Value, targets: Value, device: torch.device) -> Profile:
        job, build = self.job, self.job.build_model
        made = (build.func, repr((build.args, build.keywords))) if isinstance(build, partial) else build
        forms = [(tensor.shape, tensor.dtype) for tensor in flatten(inputs)[0]]
        key = (made, repr((forms, job.precision, job.search, job.paths)))
        if key not in _MEASURED:
            _MEASURED[key] = super()._measure(model, inputs, targets, device)
        return _MEASURED[key]


@dataclass
class LocalRun:
    """``domains`` names the workers' failure domains (default: one each)."""

    job: Job
    folder: Path
    workers: int
    stages: int | Literal["auto"] = 2
    min_workers: int = 1
    domains: Mapping[int, str] = field(default_factory=dict)
    start: Durable | None = None
    keep: int = 2
    max_workers: int | None = None
    spares: int = 0
    patience: Patience = PATIENCE
    plan_gain: PlanGain | None = None

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.fabric = self._make_fabric()
        self._lock = threading.Lock()
        folder = RunFolder.create(self.folder, "", {}, resume=RunFolder(self.folder).exists())
        self.recorder = Recorder(folder, Metrics("test"), Ledger.begin(round(steady_time() * 1e9)))
        self.host = self._host(CONTROLLER)
        self._threads: list[threading.Thread] = []
        self._hosts: list[threading.Thread] = []
        self.members: dict[int, Worker] = {}
        self.dead: set[int] = set()

    def _make_fabric(self) -> Any:
        return InProcessFabric()

    def _host(self, controller: int) -> Host:
        return Host(
            partial(self._endpoint, controller),
            self.recorder,
            checkpoint_root=self.job.checkpoint_root,
            keep=self.keep,
            recipe="test",
            crew=self,
            tick_seconds=0.02,
        )

    def _endpoint(self, worker: int, on_control: Any, on_lost: Any) -> Any:
        return self.fabric.endpoint(worker, on_control=on_control, on_lost=on_lost)

    def _inject(self, worker: int, signal: str) -> None:
        self.kill(worker)
        raise Killed

    def kill(self, worker: int) -> None:
        self.dead.add(worker)
        self.fabric.kill(worker, f"{worker} was killed")
        self.host.post(Lost(worker, "process died"))

    def lose_controller(self) -> None:
        """As SIGKILL would; whatever had been told to it is lost with it.

        A thread cannot be killed: it is waited for, since nothing that is dead puts anything on record
        while its successor reads it.
        """
        self.fabric.kill(self.host.endpoint.worker)
        self.host.abandon()
        if self._hosts[-1] is not threading.current_thread():
            self._hosts[-1].join(10.0)
            assert not self._hosts[-1].is_alive(), "a controller without a fabric ends"

    def new_controller(self) -> None:
        """As Ray would start it again: it knows who lives, and what is on record."""
        self.host = self._host(self.host.endpoint.worker - 1)
        self.controller = self._controller()
        alive = {number: worker for number, worker in self.members.items() if number not in self.dead}
        recorded = self.recorder.progress(0, 0).steps
        newest = recorded[-1].step if recorded else 0
        self.host.post(Learn(tuple(sorted(alive)), newest, 0.0, max(self.members) + 1))
        thread = threading.Thread(target=self._drive, args=(self.host, self.controller), daemon=True)
        thread.start()
        self._hosts.append(thread)
        for worker in alive.values():
            worker.attach(self.host.endpoint.worker, self.host.endpoint.address)

    @staticmethod
    def _drive(host: Host, controller: Controller) -> None:
        with suppress(EndpointClosed):  # a dead controller says no more
            host.run(controller)

    # The crew: a worker that is hired is another thread.

    def hire(self, worker: int) -> None:
        threading.Thread(target=self._bring, args=(worker,), daemon=True).start()

    def dismiss(self, worker: int) -> None:
        """As Ray would: whoever has not left by itself is ended, and said to have ended."""
        if worker not in self.dead:
            self.dead.add(worker)
            self.fabric.kill(worker, "ended")
        self.host.post(Lost(worker, "ended"))

    def _bring(self, number: int) -> None:
        worker = self._worker(number)
        self.members[number] = worker
        self._start(worker)

    def _worker(self, number: int) -> Worker:
        return LikeTheFirst(
            number,
            self.job,
            partial(self._endpoint, number),
            torch.device("cpu"),
            domain=self.domains.get(number, f"node-{number}"),
            controller=self.host.endpoint.worker,
            inject=partial(self._inject, number),
            compute_lock=self._lock,
        )

    def _start(self, worker: Worker) -> None:
        thread = threading.Thread(target=self._thread, args=(worker,), daemon=True)
        thread.start()
        self._threads.append(thread)
        profile, address = worker.profile, worker.endpoint.address
        joined = Joined(worker.worker, worker.domain, address, profile.forward, profile.backward)
        self.host.post(joined)

    def _thread(self, worker: Worker) -> None:
        try:
            worker.run()
        except (Killed, EndpointClosed):
            return

    def run(self, timeout: float = 60.0) -> Result:
        """Runs to the end; fails if that does not come."""
        for number in range(self.workers):
            self.members[number] = self._worker(number)
        self.controller = controller = self._controller()
        for worker in list(self.members.values()):
            self._start(worker)
        self._hosts.append(threading.Thread(target=self._drive, args=(self.host, controller), daemon=True))
        self._hosts[-1].start()
        deadline = time.monotonic() + timeout
        while self.recorder.outcome is None and time.monotonic() < deadline:
            time.sleep(0.02)  # not a join: a host that has died would turn this into a busy loop
        for host in self._hosts:
            host.join(max(0.0, deadline - time.monotonic()))
        alive, controller = any(host.is_alive() for host in self._hosts), self.controller
        self.fabric.close()
        for worker in list(self.members.values()):
            worker._commands.put(Leave("the test is over"))  # the fabric may have closed before it came
        for thread in self._threads:
            thread.join(10)
        assert not alive, f"no end within {timeout} s: {controller.phase}, step {controller.next_record}"
        assert not any(thread.is_alive() for thread in self._threads), "a worker's thread is left behind"
        progress = self.recorder.progress(0, 0)
        return Result(progress.steps, progress.events, progress.outcome, progress.message, controller.durable)

    def _controller(self) -> Controller:
        first = self.members[0]
        terms = Terms(
            "test",
            first.layout,
            self.job.steps,
            self.workers,
            self.min_workers,
            self.start,
            max_workers=self.max_workers,
            spares=self.spares,
            patience=self.patience,
        )
        job = self.job
        keeping = SHARDINGS[job.sharding].keeping
        teaming = Teaming(job.sequence, job.sequence_slices)
        parts = (first.layout, first.profile)
        strategy = Strategy(job.schedule, job.chunks)
        chooser = plan_chooser(*parts, job.micro_batches, self.stages, strategy, keeping, teaming, job.paths)
        if job.search is not None:
            chooser, _ = searched_planners(*parts, job, job.search)
        return Controller(terms, chooser, self.plan_gain, plan_mender(*parts, salvageable(*parts, job)))


def run_toy(
    folder: Path,
    workers: int,
    stages: int | Literal["auto"] = 2,
    faults: tuple[Fault, ...] = (),
    name: str = "run",
    **changes: Any,
) -> Result:
    job = toy_job(folder / name, faults=faults, **changes)
    return LocalRun(job, folder / name, workers, stages).run()
