"""A worker: follows plans step after step by itself, and tells the controller as it goes.

This class knows nothing of Ray; ``actors.ray_worker`` puts it into an actor, tests into a thread.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from actors.line import Line
from actors.shard_writer import ShardWriter
from actors.step_records import StepRecords
from runtime.fabric.interface import (
    ControlCallback,
    Endpoint,
    EndpointClosed,
    Interrupted,
    LostCallback,
    Message,
    Tag,
)
from runtime.plan import CONTROLLER, Plan, WorkerId
from runtime.protocol import (
    Change,
    Entry,
    Exponents,
    Failing,
    Greeting,
    Held,
    Here,
    Injecting,
    Interrupt,
    Leave,
    Measured,
    Moved,
    PeerLost,
    Probe,
    Repeated,
    Resume,
    Settled,
    Stop,
)
from runtime.pulse import Pulse
from runtime.snapshots import ShardStore
from strategies.job import Job
from strategies.model import build_model
from strategies.move import Mover
from strategies.profile import Profile, profile
from strategies.salvage import StepProgress
from strategies.stage import StageModel
from strategies.step import StepRunner

EndpointMaker = Callable[[ControlCallback, LostCallback], Endpoint]

NEVER = 1 << 62
"""A generation that no plan has."""


def kill_this_process(name: str) -> None:
    """The real fault: a signal to this very process."""
    os.kill(os.getpid(), signal.Signals[name])


class Worker:
    """One worker of a job. ``run`` returns when the controller sends it away.

    ``domain`` names its failure domain. ``attach`` and ``notice`` may be called from any thread.
    """

    def __init__(
        self,
        worker: WorkerId,
        job: Job,
        make_endpoint: EndpointMaker,
        device: torch.device,
        *,
        domain: str = "",
        controller: WorkerId = CONTROLLER,
        inject: Callable[[str], None] = kill_this_process,
        compute_lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.worker = worker
        self.job = job
        self.domain = domain
        self._inject = inject
        self._commands: queue.SimpleQueue[Interrupt | Resume | Change | Leave] = queue.SimpleQueue()
        self._stop = False
        self.abandoned = False
        self._ended = threading.Event()
        self._line = Line(worker, controller)
        self._tell = self._line.tell
        self._records = StepRecords(worker, self._line)
        self._writer = ShardWriter(worker, job.checkpoint_root, self._line, self._fault)
        self._plan: Plan | None = None
        self._pending: Change | None = None
        self._version = 0
        self.pulse = Pulse()
        self._began: dict[int, float] = {}
        self._exponents: dict[int, Exponents] = {}
        self._gone: set[WorkerId] = set()
        lock = compute_lock or nullcontext()
        with lock:
            model = build_model(job.build_model, job.seed)
            self.data = job.build_data()
            self.profile: Profile = profile(
                model,
                *self.data.micro_batch(1, 0),
                seed=job.seed,
                precision=job.precision,
                device=device,
            )
        self.layout = model.layout
        self.store = ShardStore()
        self.stage = StageModel(
            model,
            seed=job.seed,
            precision=job.precision,
            device=device,
            exact=job.reduction == "exact",
            compute_lock=compute_lock,
            pulse=self.pulse,
        )
        self._build_lock = lock
        self._progress = StepProgress(keeps=job.salvage and job.reduction == "exact")
        self.endpoint = self._line.endpoint = make_endpoint(self._on_control, self._on_lost)

    # --- the control channel ----------------------------------------------------------------

    def _on_control(self, message: Message) -> None:
        command = message.note
        if message.sender < 0 and message.sender != self._line.controller:
            return  # of a controller that has been replaced
        match command:
            case Stop():
                self._stop = True
            case Interrupt():
                self.endpoint.interrupt(command.generation, command.lost)
                self._commands.put(command)
            case Resume():
                self._commands.put(command)
            case Change():
                if self._plan is not None and self.worker in self._plan.workers:
                    self._pending = command
                else:
                    self._commands.put(command)
            case Probe():
                self._line.answer(command)
            case Greeting():
                self._line.greeted(message.sender, command)
            case Leave():
                self._dismiss(command)

    def _dismiss(self, leave: Leave) -> None:
        self._commands.put(leave)
        self.endpoint.interrupt(NEVER)

    def _on_lost(self, peer: WorkerId, reason: str) -> None:
        if peer >= 0:
            self._gone.add(peer)
            self._tell(PeerLost(self.worker, peer, reason))
        elif peer == self._line.controller:
            self._line.broke()

    def attach(self, controller: WorkerId, address: str) -> None:
        """Another controller has taken over: tells it where this worker stands."""
        if self.endpoint.generation == NEVER:
            return  # sent away already
        self._line.attach(controller, address)
        pending = self._pending
        here = Here(
            self.worker,
            self.endpoint.address,
            self.domain,
            self.profile.forward,
            self.profile.backward,
            self.endpoint.generation,
            self._plan,
            None if pending is None else pending.plan.generation,
            self._version,
            self._records.whole,
        )
        self._line.introduce(here, self._gone)

    def notice(self, reason: str, deadline: float | None = None) -> None:
        """This worker is to go: the controller sees to it that nothing is lost."""
        self._line.notice(reason, deadline)

    def _beat(self) -> None:
        """Leaves where no controller comes back."""
        seconds = self.job.orphan_seconds
        if self._line.beat(self.pulse, self._ended, self.job.beat_seconds, seconds):
            self.abandoned = True
            self._dismiss(Leave(f"there was no controller for {seconds:.0f} s"))

    def run(self) -> str:
        """Follows the controller's commands until ``Leave``; returns its reason.

        Raises EndpointClosed if the endpoint is closed under it.
        """
        # OpenMP counts threads per calling thread: a number set in another one does not hold here
        torch.set_num_threads(self.job.threads)
        threading.Thread(target=self._beat, name=f"beat-{self.worker}", daemon=True).start()
        try:
            return self._obey()
        finally:
            self._ended.set()

    def _obey(self) -> str:
        while True:
            command = self._commands.get()
            match command:
                case Leave(reason):
                    self._writer.close()
                    self.endpoint.close()
                    return reason
                case Interrupt(generation):
                    if generation == self.endpoint.acknowledge():
                        self._pending = None
                        self._tell_held(generation)
                case Resume(plan):
                    self._guarded(plan, partial(self._follow, command))
                case Change(plan):
                    self._guarded(plan, partial(self._enter, command))

    def _tell_held(self, generation: int) -> None:
        now = time.perf_counter()
        ages = {version: now - began for version, began in self._began.items()}
        working = {block: v for block, v in self.stage.version.items() if v is not None}
        self._tell(
            Held(
                self.worker,
                generation,
                self.store.holdings(),
                working,
                dict(self._exponents),
                ages,
                self._records.whole,
                self._records.unfinished,
                self._progress.report(),
            )
        )

    def _guarded(self, plan: Plan, follow: Callable[[], None]) -> None:
        """Enters the plan's generation and follows it until something else comes."""
        generation = plan.generation
        if generation >= self.endpoint.generation:
            self.endpoint.interrupt(generation)
        if self.endpoint.acknowledge() != generation:
            return  # overtaken by a newer change, whose command waits in the queue
        try:
            follow()
        except Interrupted:
            return
        except EndpointClosed:
            raise
        except Exception as error:
            detail = "".join(traceback.format_exception(error)) if not isinstance(error, ValueError) else ""
            self._tell(Failing(self.worker, f"{error}\n{detail}".rstrip()))

    # --- following a plan -------------------------------------------------------------------

    def _follow(self, resume: Resume) -> None:
        plan, version = resume.plan, resume.version
        self._fault("recovery", version + 1, 0)
        if self.worker not in plan.workers:
            self._plan = None
            self.endpoint.connect({w: a for w, a in resume.addresses.items() if w != self.worker})
            self._mover(resume).serve()
            return
        self._train(resume, self._move(resume))

    def _enter(self, change: Change) -> None:
        """Comes in where those at work say that the change takes place."""
        self.endpoint.connect({w: a for w, a in change.addresses.items() if w != self.worker})
        entry: Entry = self.endpoint.receive(change.usher, Tag(change.plan.generation, 0, 0, "entry")).note
        resume = _at_boundary(change, entry)
        self._train(resume, self._move(resume))

    def _cross(self, change: Change, version: int) -> Resume | None:
        """At the boundary after ``version`` steps: what to go on with, or None for who has no work any more.

        Raises Interrupted if something else has come first.
        """
        generation = change.plan.generation
        self.endpoint.connect({w: a for w, a in change.addresses.items() if w != self.worker})
        self.endpoint.interrupt(generation)
        if self.endpoint.acknowledge() != generation:
            raise Interrupted(self.endpoint.generation)
        entry = Entry(version, self._exponents[version], self._records.unfinished_of(version))
        resume = _at_boundary(change, entry)
        if self.worker == change.usher:
            assert self._plan is not None
            for newcomer in sorted(set(change.plan.workers) - set(self._plan.workers)):
                self.endpoint.send(newcomer, Tag(generation, 0, 0, "entry"), note=entry)
        if self.worker in change.plan.workers:
            return resume
        self._plan = None
        self._mover(resume).serve()
        return None

    def _mover(self, resume: Resume) -> Mover:
        def settled() -> None:
            self._tell(Settled(self.worker, resume.plan.generation))

        parts = (self.job, self.layout, self.endpoint, self.worker, self.stage, self.store)
        return Mover(*parts, resume, on_settled=settled)

    def _move(self, resume: Resume) -> Mover:
        began = time.perf_counter()
        plan, version = resume.plan, resume.version
        self.endpoint.connect({w: a for w, a in resume.addresses.items() if w != self.worker})
        mover = self._mover(resume)
        self._plan, self._pending = plan, None
        # Known before anything is held at this version: a further loss may cut the move short. Those of the
        # version before are kept, which a loss before everything has been copied goes back to.
        kept = {v: e for v, e in self._exponents.items() if v < version} if resume.source == "peers" else {}
        self._exponents = {**kept, version: resume.exponents}
        salvaged = resume.salvage
        if salvaged is None or self.worker not in salvaged.contributors:
            self._progress.begin(0, 0, (0, 0))  # the sums that it speaks of may not survive the move
        with self._build_lock if resume.source == "initial" else nullcontext():
            mover.move()
        self._version = version
        self._records.follow(plan, version, resume.record)
        self._tell(Moved(self.worker, plan.generation, time.perf_counter() - began, mover.bytes_received))
        return mover

    def _runner(self, resume: Resume, mover: Mover) -> StepRunner:
        plan = resume.plan
        return StepRunner(
            job=self.job,
            layout=self.layout,
            endpoint=self.endpoint,
            plan=plan,
            worker=self.worker,
            stage=self.stage,
            store=self.store,
            data=self.data,
            fault=self._fault,
            exponents=self._exponents,
            stop_requested=lambda: self._stop,
            on_repeat=lambda step, attempt: self._tell_repeat(plan.workers[0], step, attempt),
            pending_change=self._pending_generation,
            settle=mover.settle,
            known=self._records.complete,
            remember=self._records.remember,
            progress=self._progress,
            salvage=resume.salvage,
        )

    def _pending_generation(self) -> int:
        pending = self._pending
        return 0 if pending is None else pending.plan.generation

    def _train(self, resume: Resume, mover: Mover) -> None:
        """Step after step, through changes of plan, until the run's end or until there is no work here."""
        while True:
            plan, version = resume.plan, resume.version
            runner = self._runner(resume, mover)
            stopping = written = False
            change = 0
            while version < resume.stop_at and not stopping and not change:
                self._began = {v: began for v, began in self._began.items() if version - 2 <= v < version}
                self._began[version] = time.perf_counter()
                outcome = runner.run(version, is_last=version + 1 == resume.stop_at)
                self._records.tell(version)
                version += 1
                self._version = version
                stopping, change = outcome.stop, outcome.change
                self._tell_measured(version, runner)
                written = self.job.checkpoint_every > 0 and version % self.job.checkpoint_every == 0
                if written:
                    self._write(runner, version, is_last=version == resume.stop_at or stopping)
            if not change:
                break
            pending = self._pending
            assert pending is not None and pending.plan.generation == change, "all have said that they know"
            following = self._cross(pending, version)
            if following is None:
                return
            resume, mover = following, self._move(following)
        self._records.complete(version, runner.conclude(version))
        self._records.tell(version)
        if not written:
            self._write(runner, version, is_last=True)
        self._writer.finish(plan.generation, version)

    def _tell_repeat(self, reporter: WorkerId, step: int, attempt: int) -> None:
        if self.worker == reporter:
            self._tell(Repeated(self.worker, step, attempt))

    def _tell_measured(self, step: int, runner: StepRunner) -> None:
        times = self.stage.take_times()
        counts = times.micro_batches
        self._tell(
            Measured(
                self.worker,
                step,
                {layer: seconds / counts[layer] for layer, seconds in times.forward.items()},
                {layer: seconds / counts[layer] for layer, seconds in times.backward.items()},
                asdict(runner.seconds),
                self._resident_bytes(),
            )
        )

    def _resident_bytes(self) -> dict[str, int]:
        return {
            "parameters": sum(tensor.nbytes for tensor in self.stage.working.values()),
            "accumulators": sum(tensor.nbytes for tensor in self.stage.accumulators.values()),
            "shards": self.store.bytes(),
            "inbox_peak": self.endpoint.statistics()["inbox_peak_bytes"],
        }

    def _write(self, runner: StepRunner, version: int, *, is_last: bool) -> None:
        self._writer.write(runner.rounds, self.store, version, self._exponents[version], is_last=is_last)

    def _fault(self, where: str, step: int, micro_batch: int) -> None:
        for fault in self.job.faults:
            if (fault.worker, fault.step, fault.at) == (self.worker, step, where) and fault.micro_batch in (
                None,
                micro_batch,
            ):
                self._tell(Injecting(self.worker, step, where, fault.signal, time.time()))
                self._inject(fault.signal)


def _at_boundary(change: Change, entry: Entry) -> Resume:
    """A planned change, once it is known where it takes place."""
    return Resume(
        plan=change.plan,
        version=entry.version,
        source="peers",
        addresses=change.addresses,
        transfers=change.transfers,
        exponents=entry.exponents,
        stop_at=change.stop_at,
        record=entry.record,
    )
