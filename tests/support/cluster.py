"""A whole run in one process: the real controller and workers, as threads on the in-process fabric."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from actors.host import Host, steady_time
from actors.planning import plan_chooser
from actors.recorder import Recorder
from actors.worker import Worker
from runtime.controller import Controller
from runtime.events import Event, StepRecord
from runtime.fabric.inprocess import InProcessFabric
from runtime.fabric.interface import EndpointClosed
from runtime.goodput import Ledger
from runtime.metrics import Metrics
from runtime.plan import CONTROLLER
from runtime.protocol import Leave
from runtime.run_folder import RunFolder
from runtime.signals import Durable, Joined, Lost, Terms
from strategies.job import Fault, Job
from strategies.optimizer import OptimizerSettings
from tests.support.models import Tokens, build

OPTIMIZER = OptimizerSettings(learning_rate=3e-2, warmup_steps=2, decay_steps=8, clip_norm=0.5)


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

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.fabric = InProcessFabric()
        self._lock = threading.Lock()
        folder = RunFolder.create(self.folder, "", {}, resume=RunFolder(self.folder).exists())
        self.recorder = Recorder(folder, Metrics("test"), Ledger.begin(round(steady_time() * 1e9)))
        self.host = Host(
            partial(self._endpoint, CONTROLLER),
            self.recorder,
            checkpoint_root=self.job.checkpoint_root,
            keep=self.keep,
            recipe="test",
        )
        self._threads: list[threading.Thread] = []
        self.members: dict[int, Worker] = {}

    def _endpoint(self, worker: int, on_control: Any, on_lost: Any) -> Any:
        return self.fabric.endpoint(worker, on_control=on_control, on_lost=on_lost)

    def _inject(self, worker: int, signal: str) -> None:
        self.kill(worker)
        raise Killed

    def kill(self, worker: int) -> None:
        self.fabric.kill(worker, f"{worker} was killed")
        self.host.post(Lost(worker, "process died"))

    def _thread(self, worker: Worker) -> None:
        try:
            worker.run()
        except (Killed, EndpointClosed):
            return

    def run(self, timeout: float = 60.0) -> Result:
        """Runs to the end; fails if that does not come."""
        for number in range(self.workers):
            worker = Worker(
                number,
                self.job,
                partial(self._endpoint, number),
                torch.device("cpu"),
                inject=partial(self._inject, number),
                compute_lock=self._lock,
            )
            self.members[number] = worker
        first = self.members[0]
        terms = Terms("test", first.layout, self.job.steps, self.workers, self.min_workers, self.start)
        chooser = plan_chooser(first.layout, first.profile, self.job.micro_batches, self.stages)
        controller = Controller(terms, chooser)
        for number, worker in self.members.items():
            thread = threading.Thread(target=self._thread, args=(worker,), daemon=True)
            thread.start()
            self._threads.append(thread)
            profile = worker.profile
            domain = self.domains.get(number, f"node-{number}")
            self.host.post(Joined(number, domain, worker.endpoint.address, profile.forward, profile.backward))
        host = threading.Thread(target=self.host.run, args=(controller,), daemon=True)
        host.start()
        host.join(timeout)
        alive = host.is_alive()
        self.fabric.close()
        for worker in self.members.values():
            worker._commands.put(Leave("the test is over"))  # the fabric may have closed before it came
        for thread in self._threads:
            thread.join(10)
        assert not alive, f"no end within {timeout} s: {controller.phase}, step {controller.next_record}"
        assert not any(thread.is_alive() for thread in self._threads), "a worker's thread is left behind"
        progress = self.recorder.progress(0, 0)
        return Result(progress.steps, progress.events, progress.outcome, progress.message, controller.durable)


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
