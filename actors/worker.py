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
from functools import partial
from typing import Any

import torch

from actors.follower import Follower
from actors.gauge import Gauge
from actors.line import Line
from runtime.fabric.interface import EndpointClosed, EndpointMaker, Interrupted, Message
from runtime.plan import CONTROLLER, WorkerId
from runtime.protocol import (
    Change,
    Echo,
    Echoed,
    Failing,
    Greeting,
    Here,
    Injecting,
    Interrupt,
    Leave,
    PeerLost,
    Probe,
    Resume,
    Stop,
)
from runtime.pulse import Pulse
from runtime.snapshots import ShardStore
from strategies.boundary import Value, flatten
from strategies.devices import known_peak
from strategies.job import Job
from strategies.model import Model, build_model
from strategies.profile import Profile
from strategies.sequence.phases import cut
from strategies.sequence.stage import SequenceStage
from strategies.stage import StageModel
from strategies.warm_up import profile

NEVER = 1 << 62
"""A generation that no plan has."""


def kill_this_process(name: str) -> None:
    """The real fault: a signal to this very process."""
    os.kill(os.getpid(), signal.Signals[name])


class Worker:
    """One worker of a job. ``run`` returns when the controller sends it away.

    ``domain`` names its failure domain. ``attach``, ``wait_on`` and ``notice`` may be called from any thread;
    ``on_beat`` is called with every sign of life, in a thread of its own.
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
        on_beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.worker = worker
        self._on_beat = on_beat
        self.job = job
        self.domain = domain
        self._inject = inject
        self._commands: queue.SimpleQueue[Interrupt | Resume | Change | Leave] = queue.SimpleQueue()
        self.abandoned = False
        self._ended = threading.Event()
        self._line = Line(worker, controller)
        self._tell = self._line.tell
        self.pulse = Pulse()
        self._gone: set[WorkerId] = set()
        self._gauge = Gauge(worker)
        lock = compute_lock or nullcontext()
        with lock:
            model = build_model(job.build_model, job.seed)
            self.data = job.build_data()
            inputs, targets = self.data.micro_batch(1, 0)
            for side in (inputs, targets) if job.sequence_slices > 1 else ():
                cut(flatten(side)[0], job.sequence_slices)  # refused here, before anybody trains
            self.profile: Profile = self._measure(model, inputs, targets, device)
        self.layout = model.layout
        self.store = ShardStore()
        self._compute_lock = compute_lock
        self.follower = self._make_follower(model, device, lock)
        self.endpoint = self._line.endpoint = make_endpoint(self._on_control, self._on_lost)

    def _measure(self, model: Model, inputs: Value, targets: Value, device: torch.device) -> Profile:
        """The warm-up. Raises ValueError for a model that cannot be trained layer by layer."""
        job = self.job
        return profile(
            model,
            inputs,
            targets,
            seed=job.seed,
            precision=job.precision,
            device=device,
            detailed=job.search is not None,
            shared=job.search is not None and max(job.search.sequences) > 1,
            joints=job.paths.joints if job.paths is not None else (),
        )

    def _make_follower(
        self, model: Model, device: torch.device, lock: AbstractContextManager[Any]
    ) -> Follower:
        """What computes this worker's steps."""
        job = self.job
        sliced = job.sequence_slices > 1
        make = partial(SequenceStage, slices=job.sequence_slices) if sliced else StageModel
        self.stage = make(
            model,
            seed=job.seed,
            precision=job.precision,
            device=device,
            exact=job.reduction == "exact",
            compute_lock=self._compute_lock,
            pulse=self.pulse,
            keeps=job.keeps_under(),
        )
        flops = self.profile.flops
        return Follower(
            self.worker,
            job,
            self._line,
            self.stage,
            self.store,
            self.data,
            fault=self._fault,
            build_lock=lock,
            step_flops=None if flops is None else job.micro_batches * sum(flops),
            peak_flops=known_peak(device, autocast=job.precision.autocast),
        )

    # --- the control channel ----------------------------------------------------------------

    def _on_control(self, message: Message) -> None:
        command = message.note
        if message.sender < 0 and message.sender != self._line.controller:
            return  # of a controller that has been replaced
        match command:
            case Stop():
                self.follower.stop = True
            case Interrupt():
                self.endpoint.interrupt(command.generation, command.lost)
                self._commands.put(command)
            case Resume():
                self._commands.put(command)
            case Change():
                if not self.follower.is_told(command):
                    self._commands.put(command)
            case Probe():
                self._line.answer(command)
            case Greeting():
                self._line.greeted(message.sender, command)
            case Echo():
                self._gauge.answer(self.endpoint, message.sender, command)
            case Echoed():
                self._gauge.answered(command)
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

    def wait_on(self) -> None:
        """Waits for a controller as long as if the last one had gone only now. From any thread."""
        self._line.wait_on()

    def attach(self, controller: WorkerId, address: str) -> None:
        """Another controller has taken over: tells it where this worker stands."""
        if self.endpoint.generation == NEVER:
            return  # sent away already
        self._line.attach(controller, address)
        here = Here(
            self.worker,
            self.endpoint.address,
            self.domain,
            self.profile.forward,
            self.profile.backward,
            self.endpoint.generation,
            self.follower.plan,
            self.follower.pending_generation() or None,
            self.follower.version,
            self.follower.records.whole,
            self.follower.settled,
        )
        self._line.introduce(here, self._gone)

    def notice(self, reason: str, deadline: float | None = None) -> None:
        """This worker is to go: the controller sees to it that nothing is lost."""
        self._line.notice(reason, deadline)

    def _beat(self) -> None:
        """Leaves where no controller comes back."""
        seconds = self.job.orphan_seconds
        if self._line.beat(self.pulse, self._ended, self.job.beat_seconds, seconds, self._on_beat):
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
                    self.follower.writer.close()
                    self.endpoint.close()
                    return reason
                case Interrupt(generation):
                    if generation == self.endpoint.acknowledge():
                        self._tell(self.follower.held(generation))
                case Resume():
                    self._guarded(command, partial(self.follower.follow, command))
                case Change():
                    self._guarded(command, partial(self.follower.enter, command))

    def _measure_link(self, command: Resume | Change) -> None:
        """Only a search asks what links carry."""
        if self.job.search is not None:
            self._gauge.begin(self.endpoint, command.plan, command.addresses, self._line.linked)

    def _guarded(self, command: Resume | Change, follow: Callable[[], None]) -> None:
        """Enters the generation of the command's plan and follows it until something else comes."""
        generation = command.plan.generation
        if generation >= self.endpoint.generation:
            self.endpoint.interrupt(generation)
        if self.endpoint.acknowledge() != generation:
            return  # overtaken by a newer change, whose command waits in the queue
        try:
            self._measure_link(command)
            follow()
        except Interrupted:
            return
        except EndpointClosed:
            raise
        except Exception as error:
            detail = "".join(traceback.format_exception(error)) if not isinstance(error, ValueError) else ""
            self._tell(Failing(self.worker, f"{error}\n{detail}".rstrip()))

    def _fault(self, where: str, step: int, micro_batch: int) -> None:
        for fault in self.job.faults:
            if (fault.worker, fault.step, fault.at) == (self.worker, step, where) and fault.micro_batch in (
                None,
                micro_batch,
            ):
                self._tell(Injecting(self.worker, step, where, fault.signal, time.time()))
                self._inject(fault.signal)
