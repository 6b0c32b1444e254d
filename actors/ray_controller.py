"""The Ray actor around the controller: it brings the workers, drives the decisions and keeps the record.

If its process dies, Ray starts it again with the same arguments, while training goes on; it then finds the
workers by name and learns from them where the run stands.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress

import ray

from actors.crew import RayCrew, end_all, worker_names
from actors.exposition import Exposition
from actors.feed import FeedCrew
from actors.forming import bring
from actors.host import Host, steady_time
from actors.planning import demand, planners, team_size
from actors.ray_worker import SWITCH_INTERVAL, Ready
from actors.reassurance import Reassurance
from actors.recorder import Recorder, RunProgress
from actors.run_settings import RunSettings
from runtime.checkpoint import discard_after, newest_whole
from runtime.controller import Controller
from runtime.events import CheckpointSkipped
from runtime.fabric.interface import ControlCallback, LostCallback
from runtime.fabric.secret import secret_of
from runtime.fabric.sockets import SocketEndpoint
from runtime.goodput import Ledger
from runtime.plan import CONTROLLER, Plan, WorkerId
from runtime.protocol import Measured
from runtime.run_folder import RunFolder
from runtime.signals import Drain, Durable, Learn, Lost, Resize, Terms
from runtime.sizing import problem_of_size
from strategies.job import Job

SETTLE_SECONDS = 30.0
"""How long a person's wish may wait for a controller that takes over."""


class ControllerActor:
    """The run lives in a thread of its own; the methods answer meanwhile."""

    def __init__(self, job: Job, settings: RunSettings, secret: bytes | None) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._job, self._settings = job, settings
        self._secret = secret_of(settings.name, secret)
        self._folder = RunFolder(settings.folder)
        facts = self._folder.controller_facts()
        self._is_anew = ray.get_runtime_context().was_current_actor_reconstructed
        # of an id that no controller of this run had: what the dead one said last must not be mistaken
        self._me: WorkerId = CONTROLLER - 1 - secrets.randbelow(1 << 31) if self._is_anew else CONTROLLER
        # what a person asked for holds until the run ends, not when it is resumed
        self._aim: int | None = facts.get("aim") if self._is_anew else None
        earlier = facts.get("metrics_port") if self._is_anew else None
        share = settings.place.gpus or 1.0
        self._exposition = Exposition(self._folder.name, settings.metrics, job, share, earlier)
        metrics = self._exposition.metrics
        self._reassurance = (
            Reassurance(worker_names(settings.name), job.orphan_seconds) if self._is_anew else None
        )
        now = steady_time()
        self._recorder = (
            Recorder.replay(self._folder, metrics, now, since=facts.get("began", 0.0))
            if self._is_anew
            else Recorder(self._folder, metrics, Ledger.begin(round(now * 1e9)))
        )
        self._noting = threading.Lock()
        self._note(
            metrics_port=self._exposition.port,
            starts=facts.get("starts", 0) + 1,
            began=facts.get("began", now) if self._is_anew else now,
            aim=self._aim,
            avoided=facts.get("avoided", []) if self._is_anew else [],
        )
        self._first: Ready | None = None
        self._crew: RayCrew
        self._host = Host(
            self._make_endpoint,
            self._recorder,
            checkpoint_root=job.checkpoint_root,
            keep=settings.keep,
            recipe=settings.recipe,
            tick_seconds=settings.patience.beat_seconds,
        )
        self._crew = RayCrew(
            settings.name,
            job,
            secret,
            settings.place,
            self._me,
            self._host.endpoint.address,
            self._host.post,
            self._problem_of,
            lambda worker: self._note(next_worker=worker + 1),
        )
        self._crew.avoided.update(facts.get("avoided", ()) if self._is_anew else ())
        self._host.crew = self._crew
        self._feed = FeedCrew(
            settings.name,
            job,
            settings.feed_cpus,
            note=lambda event: self._recorder.event(event, steady_time()),
            step=lambda: self._recorder.steps[-1].step + 1 if self._recorder.steps else 1,
            emptied=self._crew.emptied,
            empty_seconds=settings.feed_empty_seconds,
        )
        self._stopping, self._done = threading.Event(), threading.Event()
        self._error: ValueError | None = None
        threading.Thread(target=self._live, name="run", daemon=True).start()

    def _make_endpoint(self, on_control: ControlCallback, on_lost: LostCallback) -> SocketEndpoint:
        return SocketEndpoint(
            self._me,
            self._secret,
            host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            on_control=on_control,
            on_lost=on_lost,
        )

    def _note(self, **facts: object) -> None:
        with suppress(OSError), self._noting:  # a full disk costs the record, not the run
            self._folder.note_controller(**facts)

    def metrics_port(self) -> int | None:
        return self._exposition.port

    def process(self) -> int:
        """The controller's own process id."""
        return os.getpid()

    def node(self) -> str:
        """The id of the Ray node that the controller is on."""
        return str(ray.get_runtime_context().get_node_id())

    def processes(self) -> Mapping[WorkerId, int]:
        """The workers' process ids, once they are ready; lost ones among them."""
        return dict(self._crew.processes)

    def domains(self) -> Mapping[WorkerId, str]:
        """The workers' Ray nodes, by id, likewise."""
        return dict(self._crew.domains)

    def progress(self, steps_seen: int, events_seen: int) -> RunProgress:
        return self._recorder.progress(steps_seen, events_seen)

    def badput(self) -> Mapping[str, float]:
        return self._recorder.badput()

    def piece(self, name: str, offset: int) -> bytes | None:
        """As ``RunFolder.piece``, for those who cannot read this machine's disks."""
        return self._folder.piece(name, offset)

    def feed_processes(self) -> Mapping[int, int]:
        """The feed workers' process ids, once they are ready; those that were lost and not yet replaced among
        them."""
        return dict(self._feed.processes)

    def plan(self) -> Plan | None:
        """The newest plan; None before the first."""
        return self._host.plan

    def measured(self) -> Mapping[WorkerId, Measured]:
        """What each worker measured in its newest step."""
        return dict(self._host.measured)

    def stop(self) -> None:
        self._stopping.set()
        self._settle()
        self._host.stop()

    def drain(self, worker: WorkerId, reason: str, deadline: float | None = None) -> bool:
        """Has a worker leave at the next step boundary; False if it has no work in this run."""
        self._settle()
        plan = self._host.plan
        if plan is None or worker not in plan.workers:
            return False
        self._host.post(Drain(worker, reason, deadline))
        return True

    def drain_node(self, node: str, deadline: float | None = None) -> tuple[WorkerId, ...]:
        """As ``RayCrew.leave_node``, of those who have work in this run."""
        self._settle()
        plan = self._host.plan
        told = self._crew.leave_node(node, plan.workers if plan else (), deadline)
        self._note(avoided=sorted(self._crew.avoided))
        return told

    def resize(self, workers: int) -> None:
        """Aims for so many workers from now on. Raises ValueError if the recipe does not allow that."""
        settings = self._settings
        problem = problem_of_size(workers, settings.min_workers, settings.workers, settings.max_workers)
        if problem is not None:
            raise ValueError(problem)
        self._settle()
        self._aim = workers
        self._note(aim=workers)
        self._host.post(Resize(workers))

    def _settle(self) -> None:
        """Waits, where this controller takes over from one that died, until it knows where the run stands:
        what is asked of it before would be asked of a run without workers."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self._is_anew and self._host.plan is None and time.monotonic() < deadline:
            if self._done.wait(0.05):
                return

    def ended(self, seconds: float) -> bool:
        """Whether the run has ended, after waiting for that at most so long.

        Raises ValueError for a mistake of the user that only showed when the model was built.
        """
        ended = self._done.wait(seconds)
        if self._error is not None:
            raise self._error
        return ended

    def _live(self) -> None:
        try:
            if self._recorder.outcome is not None:
                return  # the predecessor died after the run's end
            self._feed.start()
            controller = self._take_over() if self._is_anew else self._form(0)
            if controller is None:
                self._recorder.finish("interrupted", "stopped before the first step", steady_time())
                return
            threading.Thread(target=self._crew.watch_drains, daemon=True).start()
            self._host.run(controller)
        except ValueError as error:
            self._error = error
            self._recorder.finish("failed", str(error), steady_time())
        finally:
            with ExitStack() as ends:  # the last one first, and all of them whatever one raises
                ends.callback(self._done.set)
                ends.callback(self._exposition.close)
                ends.callback(end_all, self._settings.name)
                ends.callback(self._feed.end)
                if self._reassurance is not None:  # the take-over may have failed, or there was none to make
                    self._reassurance.end()
                if self._recorder.outcome is None:
                    self._recorder.finish("failed", "the controller met an error: see its log", steady_time())

    # --- a new run ----------------------------------------------------------------------------

    def _form(self, first: WorkerId) -> Controller | None:
        """Brings the first workers, with ids from ``first``, and lets the controller know of them; None where
        a person stopped the run before there was one."""
        workers = range(first, first + self._settings.workers)
        found = bring(self._crew, workers, self._settings.min_workers, self._stopping.is_set)
        ready = found.ready
        if not ready and self._stopping.is_set():
            return None
        if not ready:
            raise ValueError("no worker could be started: see `ray status` for the cluster's resources")
        self._first = next(iter(ready.values()))
        for worker, each in ready.items():
            problem = self._problem_of(worker, each)
            if problem is not None:
                raise ValueError(problem)
        resume = self._settings.resume or self._is_anew
        start = self._newest_checkpoint(self._first) if resume else None
        starting = tuple(sorted(found.starting))
        controller = self._controller(self._first, start, first + self._settings.workers, starting)
        for worker, each in ready.items():
            self._crew.welcome(worker, each)
        for worker, reference in found.starting.items():
            self._crew.expect(worker, reference)
        for worker, reason in found.lost.items():
            self._host.post(Lost(worker, reason))
        return controller

    def _problem_of(self, worker: WorkerId, ready: Ready) -> str | None:
        """Why a worker cannot be one of this run, or None."""
        assert self._first is not None
        if ready.data != self._first.data:
            return (
                "the workers' machines hold different data under the same name (the contents differ): name a "
                "folder in data.arguments that all machines share, or put the same files on each"
            )
        if ready.layout != self._first.layout:
            return (
                "the workers built different models: the model's build function must depend on nothing but "
                "its arguments and torch's random generator"
            )
        return None

    def _controller(
        self,
        ready: Ready,
        start: Durable | None,
        next_worker: WorkerId,
        starting: tuple[WorkerId, ...] = (),
    ) -> Controller:
        settings, batch = self._settings, self._job.micro_batches
        first, most = settings.workers, settings.max_workers
        about = (ready.layout, ready.profile)
        sharing = team_size(self._job, *about, most)
        stages = settings.stages if self._job.engine is None else 1
        terms = Terms(
            run=self._folder.name,
            layout=ready.layout,
            steps=self._job.steps,
            workers=first,
            min_workers=settings.min_workers,
            start=start,
            max_workers=most,
            spares=settings.spares,
            next_worker=next_worker,
            aim=self._aim,
            useful=demand(*about, batch, stages, first, most, sharing, self._job.paths),
            starting=starting,
            patience=settings.patience,
        )
        return Controller(
            terms,
            *planners(self._job, *about, stages, rebalance=settings.rebalance),
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

    # --- after this process's predecessor died ------------------------------------------------

    def _take_over(self) -> Controller | None:
        """Learns from the workers where the run stands."""
        names = worker_names(self._settings.name)
        adopted = self._crew.adopt()
        steps = self._recorder.steps
        away = steady_time() - steps[-1].committed_at if steps else 0.0
        # an id is never used twice: peers that fenced its owner would drop what a namesake says
        noted = self._folder.controller_facts().get("next_worker", 0)
        next_worker = max(noted, *(name + 1 for name in names), 0)
        # before anybody can answer, so that it is the first that the controller hears of
        self._host.post(Learn(adopted, steps[-1].step if steps else 0, max(0.0, away), next_worker))
        asked = {self._crew.attach(worker): worker for worker in adopted}
        answers: dict[WorkerId, Ready] = {}
        for reference, worker in asked.items():
            try:
                ready: Ready | None = ray.get(reference, timeout=10.0)
            except Exception:  # dead, or it does not answer: the controller will hear nothing of it either
                ready = None
            if ready is not None:
                answers[worker] = ready
        assert self._reassurance is not None
        self._reassurance.end()
        for worker in set(asked.values()) - set(answers):
            self._crew.dismiss(worker)
        if not answers:
            self._host.forget_events()
            return self._form(next_worker)
        self._first = next(iter(answers.values()))
        # training goes on, and nothing that happens is answered before this is known: no file is read back
        newest, problems = newest_whole(self._job.checkpoint_root, self._first.layout, read_back=False)
        for problem in problems:
            self._recorder.event(CheckpointSkipped(problem), steady_time())
        start = Durable(newest.version, self._job.checkpoint_root, newest.exponents) if newest else None
        controller = self._controller(self._first, start, next_worker)
        for worker, ready in answers.items():
            self._crew.keep(worker, ready)
        return controller
