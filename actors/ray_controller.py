"""The Ray actor around the controller: it starts the workers, watches them and keeps the record."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.host import Host, steady_time
from actors.planning import plan_chooser
from actors.ray_worker import SWITCH_INTERVAL, Ready
from actors.recorder import Progress, Recorder
from runtime.checkpoint import discard_after, newest_whole
from runtime.controller import Controller
from runtime.events import CheckpointSkipped
from runtime.fabric.interface import ControlCallback, LostCallback
from runtime.fabric.sockets import SocketEndpoint
from runtime.goodput import Ledger
from runtime.metrics import Metrics
from runtime.plan import CONTROLLER, Plan, WorkerId
from runtime.protocol import Measured
from runtime.run_folder import RunFolder
from runtime.signals import Durable, Joined, Lost, Terms
from strategies.job import Job

START_SECONDS = 300.0
"""How long workers may take to be placed and warmed up before the run begins without them."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What the controller is told beside the job. ``recipe`` is the digest of what decides the bits;
    ``metrics_port`` None: no metrics are served."""

    folder: str
    workers: int
    min_workers: int
    stages: int | Literal["auto"]
    keep: int
    recipe: str
    resume: bool
    metrics_port: int | None
    metrics_host: str = "127.0.0.1"


class ControllerActor:
    """``run`` returns when the run has ended; the other methods answer meanwhile."""

    def __init__(self, job: Job, settings: RunSettings, secret: bytes) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._job, self._settings, self._secret = job, settings, secret
        folder = RunFolder(settings.folder)
        metrics = Metrics(folder.name)
        port = settings.metrics_port
        self._metrics_port = None if port is None else metrics.serve(port, settings.metrics_host)
        now = round(steady_time() * 1e9)
        self._recorder = Recorder(folder, metrics, Ledger.begin(now))
        self._host = Host(
            self._make_endpoint,
            self._recorder,
            checkpoint_root=job.checkpoint_root,
            keep=settings.keep,
            recipe=settings.recipe,
        )
        self._ready: dict[WorkerId, Ready] = {}

    def _make_endpoint(self, on_control: ControlCallback, on_lost: LostCallback) -> SocketEndpoint:
        return SocketEndpoint(
            CONTROLLER,
            self._secret,
            host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            on_control=on_control,
            on_lost=on_lost,
        )

    def metrics_port(self) -> int | None:
        return self._metrics_port

    def processes(self) -> Mapping[WorkerId, int]:
        """The workers' process ids, once they are ready."""
        return {worker: ready.process for worker, ready in self._ready.items()}

    def progress(self, steps_seen: int, events_seen: int) -> Progress:
        return self._recorder.progress(steps_seen, events_seen)

    def badput(self) -> Mapping[str, float]:
        return self._recorder.badput()

    def plan(self) -> Plan | None:
        """The newest plan; None before the first."""
        return self._host.plan

    def measured(self) -> Mapping[WorkerId, Measured]:
        """What each worker measured in its newest step."""
        return dict(self._host.measured)

    def stop(self) -> None:
        self._host.stop()

    def run(self, workers: Mapping[WorkerId, Any]) -> None:
        """Forms the run out of ``workers`` (actor handles) and sees it through.

        Raises ValueError for a mistake of the user that only showed when the model was built.
        """
        try:
            lost = self._warm_up(workers)
            controller = self._controller()
        except ValueError as error:
            self._recorder.finish("failed", str(error), steady_time())
            raise
        for worker, ready in self._ready.items():
            profile = ready.profile
            self._host.post(Joined(worker, ready.domain, ready.address, profile.forward, profile.backward))
        for worker, reason in lost.items():
            self._host.post(Lost(worker, reason))
        watched = {worker: workers[worker].run.remote() for worker in self._ready}
        threading.Thread(target=self._watch, args=(watched,), daemon=True).start()
        self._host.run(controller)
        self._recorder.metrics.close()

    def _warm_up(self, workers: Mapping[WorkerId, Any]) -> dict[WorkerId, str]:
        """Starts everybody; returns who did not make it, and why."""
        controller = self._host.endpoint.address
        pending = {handle.start.remote(controller): worker for worker, handle in workers.items()}
        deadline = time.monotonic() + START_SECONDS
        lost: dict[WorkerId, str] = {}
        while pending:
            patience = max(0.0, deadline - time.monotonic())
            done, _ = ray.wait(list(pending), num_returns=1, timeout=patience)
            if not done:
                break
            worker = pending.pop(done[0])
            try:
                self._ready[worker] = ray.get(done[0])
            except RayTaskError as error:
                if isinstance(error.cause, ValueError):
                    raise ValueError(str(error.cause)) from None
                raise ValueError(f"worker {worker} could not start: {error}") from None
            except RayActorError as error:
                lost[worker] = _first_line(error)
        for worker in pending.values():
            lost[worker] = f"was not placed within {START_SECONDS:.0f} s: the cluster has no room for it"
            ray.kill(workers[worker])
        return lost

    def _controller(self) -> Controller:
        if not self._ready:
            raise ValueError("no worker could be started: see `ray status` for the cluster's resources")
        first = next(iter(self._ready.values()))
        if len({ready.data for ready in self._ready.values()}) > 1:
            raise ValueError(
                "the workers' machines hold different data under the same name (the contents differ): name a "
                "folder in data.arguments that all machines share, or put the same files on each"
            )
        if len({ready.layout for ready in self._ready.values()}) > 1:
            raise ValueError(
                "the workers built different models: the model's build function must depend on nothing but "
                "its arguments and torch's random generator"
            )
        terms = Terms(
            run=self._recorder.folder.name,
            layout=first.layout,
            steps=self._job.steps,
            workers=self._settings.workers,
            min_workers=self._settings.min_workers,
            start=self._newest_checkpoint(first) if self._settings.resume else None,
        )
        return Controller(
            terms, plan_chooser(first.layout, first.profile, self._job.micro_batches, self._settings.stages)
        )

    def _newest_checkpoint(self, ready: Ready) -> Durable | None:
        root = self._job.checkpoint_root
        manifest, problems = newest_whole(root, ready.layout)
        for problem in problems:
            self._recorder.event(CheckpointSkipped(problem), steady_time())
        if manifest is None:
            return None
        if manifest.recipe != self._settings.recipe:
            raise ValueError(
                f"{root}/{manifest.folder} was written by another recipe (seed, model, data, optimizer, "
                "batch or precision differ): resume with the run's own recipe.toml, or start a new run"
            )
        discard_after(root, manifest.version)
        self._recorder.folder.supersede_steps(manifest.version + 1)
        return Durable(manifest.version, root, manifest.exponents)

    def _watch(self, watched: Mapping[WorkerId, Any]) -> None:
        """Tells the controller of every worker whose process ends before it was sent away."""
        pending = {reference: worker for worker, reference in watched.items()}
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            worker = pending.pop(done[0])
            try:
                ray.get(done[0])
            except RayActorError:
                self._host.post(Lost(worker, "process died"))
            except RayTaskError as error:
                self._host.post(Lost(worker, f"raised {_first_line(error)}"))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
