"""A worker: follows plans step after step by itself, and tells the controller as it goes.

This class knows nothing of Ray; ``actors.ray_worker`` puts it into an actor, tests into a thread.
"""

from __future__ import annotations

import os
import queue
import signal
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from typing import Any

import torch

from runtime.checkpoint import write_shards
from runtime.events import StepRecord
from runtime.fabric.interface import (
    CONTROL,
    ControlCallback,
    Endpoint,
    EndpointClosed,
    Interrupted,
    LostCallback,
    Message,
    Tag,
)
from runtime.plan import CONTROLLER, WorkerId
from runtime.protocol import (
    Exponents,
    Failing,
    Finished,
    Held,
    Injecting,
    Interrupt,
    Leave,
    Measured,
    Moved,
    PeerLost,
    Repeated,
    Report,
    Resume,
    Stepped,
    Stop,
    Unwritten,
    Written,
)
from runtime.snapshots import ShardStore
from strategies.job import Job
from strategies.model import build_model
from strategies.move import Mover
from strategies.profile import Profile, profile
from strategies.share import Outcome
from strategies.stage import StageModel
from strategies.step import StepRunner
from strategies.zero import piece_of

EndpointMaker = Callable[[ControlCallback, LostCallback], Endpoint]

NEVER = 1 << 62
"""A generation that no plan has."""

RECORDS_KEPT = 3
"""Whole records that a worker keeps, for the case that their reporter dies before it is heard."""


def kill_this_process(name: str) -> None:
    """The real fault: a signal to this very process."""
    os.kill(os.getpid(), signal.Signals[name])


class Worker:
    """One worker of a job. ``run`` returns when the controller sends it away."""

    def __init__(
        self,
        worker: WorkerId,
        job: Job,
        make_endpoint: EndpointMaker,
        device: torch.device,
        *,
        inject: Callable[[str], None] = kill_this_process,
        compute_lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.worker = worker
        self.job = job
        self._inject = inject
        self._commands: queue.SimpleQueue[Interrupt | Resume | Leave] = queue.SimpleQueue()
        self._stop = False
        self._began: dict[int, float] = {}
        self._exponents: dict[int, Exponents] = {}
        self._records: dict[int, StepRecord] = {}
        self._whole: dict[int, StepRecord] = {}
        self._gone: set[WorkerId] = set()
        self._writing: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
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
        )
        self._build_lock = lock
        self.endpoint = make_endpoint(self._on_control, self._on_lost)

    # --- the control channel ----------------------------------------------------------------

    def _on_control(self, message: Message) -> None:
        command = message.note
        match command:
            case Stop():
                self._stop = True
            case Interrupt():
                self.endpoint.interrupt(command.generation, command.lost)
                self._commands.put(command)
            case Resume():
                self._commands.put(command)
            case Leave():
                self._dismiss(command)

    def _dismiss(self, leave: Leave) -> None:
        self._commands.put(leave)
        self.endpoint.interrupt(NEVER)

    def _on_lost(self, peer: WorkerId, reason: str) -> None:
        # the controller's death does not stop training: everything needed is between the workers
        self._gone.add(peer)
        if peer != CONTROLLER:
            self._tell(PeerLost(self.worker, peer, reason))
        if CONTROLLER in self._gone and len(self._gone) > 1:
            # nobody is left to divide the work anew, and nobody will send this worker away
            self._dismiss(Leave("the controller and a peer are out of reach"))

    def _tell(self, report: Report) -> None:
        with suppress(EndpointClosed, Interrupted):
            self.endpoint.send(CONTROLLER, Tag(0, 0, 0, CONTROL), note=report)

    def run(self) -> str:
        """Follows the controller's commands until ``Leave``; returns its reason.

        Raises EndpointClosed if the endpoint is closed under it.
        """
        # OpenMP counts threads per calling thread: a number set in another one does not hold here
        torch.set_num_threads(self.job.threads)
        while True:
            command = self._commands.get()
            match command:
                case Leave(reason):
                    self._writer.shutdown()
                    self.endpoint.close()
                    return reason
                case Interrupt(generation):
                    if generation == self.endpoint.acknowledge():
                        self._tell_held(generation)
                case Resume():
                    self._follow_guarded(command)

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
                tuple(self._whole.values()),
                tuple(self._records.values()),
            )
        )

    def _follow_guarded(self, resume: Resume) -> None:
        generation = resume.plan.generation
        if generation >= self.endpoint.generation:
            self.endpoint.interrupt(generation)
        if self.endpoint.acknowledge() != generation:
            return  # overtaken by a newer change, whose command waits in the queue
        try:
            self._follow(resume)
        except Interrupted:
            return
        except EndpointClosed:
            raise
        except Exception as error:
            detail = "".join(traceback.format_exception(error)) if not isinstance(error, ValueError) else ""
            self._tell(Failing(self.worker, f"{error}\n{detail}".rstrip()))

    # --- following a plan -------------------------------------------------------------------

    def _follow(self, resume: Resume) -> None:
        began = time.perf_counter()
        plan, version = resume.plan, resume.version
        self.endpoint.connect({w: a for w, a in resume.addresses.items() if w != self.worker})
        self._fault("recovery", version + 1, 0)
        mover = Mover(self.job, self.layout, self.endpoint, self.worker, self.stage, self.store, resume)
        # known before anything is held at this version: a further loss may cut the move short
        self._exponents = {version: resume.exponents}
        with self._build_lock if resume.source == "initial" else nullcontext():
            mover.move()
        self._whole = {step: record for step, record in self._whole.items() if step <= version}
        self._records = {} if resume.record is None else {version: resume.record}
        self._tell(Moved(self.worker, plan.generation, time.perf_counter() - began, mover.bytes_received))
        runner = StepRunner(
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
            settle=mover.settle,
            known=self._complete,
            remember=self._remember,
        )
        is_reporter = plan.workers[0] == self.worker
        stopping = written = False
        while version < resume.stop_at and not stopping:
            self._began = {v: began for v, began in self._began.items() if version - 2 <= v < version}
            self._began[version] = time.perf_counter()
            outcome = runner.run(version)
            self._tell_record(version, is_reporter)
            version += 1
            stopping = outcome.stop
            self._tell_measured(version, runner)
            written = self.job.checkpoint_every > 0 and version % self.job.checkpoint_every == 0
            if written:
                self._write_checkpoint(runner, version, is_last=version == resume.stop_at or stopping)
        self._complete(version, runner.conclude(version))
        self._tell_record(version, is_reporter)
        if not written:
            self._write_checkpoint(runner, version, is_last=True)
        self._writer.submit(self._tell, Finished(self.worker, plan.generation, version))

    def _remember(self, record: StepRecord) -> None:
        self._records[record.step] = record

    def _complete(self, step: int, outcome: Outcome) -> None:
        """Completes the record of ``step`` by what the next exchange says of its result."""
        record = self._records.pop(step, None)
        if record is not None:
            self._whole[step] = replace(
                record, fingerprint=outcome.fingerprint, held_out_loss=outcome.held_out_loss
            )
            for old in [old for old in self._whole if old <= step - RECORDS_KEPT]:
                del self._whole[old]

    def _tell_record(self, step: int, is_reporter: bool) -> None:
        if is_reporter and step in self._whole:
            self._tell(Stepped(self.worker, self._whole[step]))

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

    # --- checkpoints and faults -------------------------------------------------------------

    def _write_checkpoint(self, runner: StepRunner, version: int, *, is_last: bool) -> None:
        """Copies the owned shards and writes them behind the training's back.

        One write at a time: where storage is slower than the checkpoints come, some are skipped.
        """
        if self._writing is not None and not self._writing.done() and not is_last:
            problem = f"worker {self.worker} was still writing the one before that of step {version}"
            self._tell(Unwritten(self.worker, version, problem))
            return
        pieces = {}
        for shard in runner.rounds.owned:
            state_3N = self.store.get(piece_of(shard), version)
            assert state_3N is not None, f"{shard} is owned but not held in version {version}"
            pieces[piece_of(shard)] = state_3N.clone()
        generation, exponents = runner.plan.generation, self._exponents[version]

        def write() -> None:
            try:
                self._fault("checkpoint", version, 0)
                root = self.job.checkpoint_root
                file = write_shards(root, version, self.worker, generation, pieces)
            except Exception as error:
                self._tell(Unwritten(self.worker, version, f"worker {self.worker} could not write: {error}"))
                return
            self._tell(Written(self.worker, generation, version, exponents, file))

        self._writing = self._writer.submit(write)

    def _fault(self, where: str, step: int, micro_batch: int) -> None:
        for fault in self.job.faults:
            if (fault.worker, fault.step, fault.at) == (self.worker, step, where) and fault.micro_batch in (
                None,
                micro_batch,
            ):
                self._tell(Injecting(self.worker, step, where, fault.signal, time.time()))
                self._inject(fault.signal)
