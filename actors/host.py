"""Drives the controller: events from the fabric and from Ray go in, its commands are carried out.

This class knows nothing of Ray; ``actors.ray_controller`` puts it into an actor, tests into a thread.
"""

from __future__ import annotations

import queue
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Protocol

from actors.recorder import Recorder
from actors.timeline_writer import TimelineWriter
from runtime.checkpoint import prune, write_manifest
from runtime.controller import Controller
from runtime.events import CheckpointSkipped, CheckpointWritten
from runtime.fabric.interface import CONTROL, Endpoint, EndpointMaker, Interrupted, Message, Tag
from runtime.plan import CONTROLLER, Plan, WorkerId
from runtime.protocol import Finished, Here, Measured, Resume, Timed
from runtime.signals import (
    CommandsSent,
    Committed,
    Dismiss,
    Durable,
    End,
    Hire,
    Input,
    Joined,
    Lost,
    ManifestFailed,
    ManifestWritten,
    Note,
    Output,
    Send,
    StopRequested,
    TakenBack,
    Tick,
    WriteManifest,
)

_ORIGIN = time.time() - time.monotonic()


def steady_time() -> float:
    """Seconds since 1970 that never run backwards."""
    return _ORIGIN + time.monotonic()


class Crew(Protocol):
    """Who brings workers and sees them off. Neither call waits."""

    def hire(self, worker: WorkerId) -> None:
        """Asks for a worker; ``Joined`` or ``Lost`` is posted when it is ready or cannot be had."""
        ...

    def dismiss(self, worker: WorkerId) -> None:
        """Sees that the worker's process ends; ``Lost`` is posted when it has."""
        ...


class Host:
    """One thread calls ``run``; any thread may call ``post`` and ``stop``, even before.

    ``checkpoint_root`` is a path or URI, ``keep`` the number of checkpoints that stay, ``recipe`` the
    digest of what decides the run's bits.
    """

    def __init__(
        self,
        make_endpoint: EndpointMaker,
        recorder: Recorder,
        *,
        checkpoint_root: str,
        keep: int,
        recipe: str,
        crew: Crew | None = None,
        tick_seconds: float = 0.1,
    ) -> None:
        self.recorder = recorder
        self._events: queue.SimpleQueue[Input] = queue.SimpleQueue()
        self._root, self._keep, self._recipe = checkpoint_root, keep, recipe
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="manifest")
        self._ended = False
        self.crew = crew
        self._tick_seconds = tick_seconds
        self.plan: Plan | None = None
        self.measured: dict[WorkerId, Measured] = {}
        self._timeline = TimelineWriter(recorder.folder)
        self.endpoint: Endpoint = make_endpoint(self._on_control, self._on_lost)

    def _on_control(self, message: Message) -> None:
        if isinstance(message.note, Timed):  # for people only: decisions do not wait for it
            self._timeline.take(message.note)
        else:
            self._events.put(message.note)

    def _on_lost(self, peer: WorkerId, reason: str) -> None:
        if peer != CONTROLLER:
            # whether the process has died, or is only out of reach, is for the crew to say
            self._events.put(Lost(peer, f"process died or cut off: {reason}", confirmed=False))

    def post(self, event: Input) -> None:
        self._events.put(event)

    def forget_events(self) -> None:
        """Drops what has come so far: only before ``run``."""
        with suppress(queue.Empty):
            while True:
                self._events.get_nowait()

    def stop(self) -> None:
        self._events.put(StopRequested())

    def abandon(self) -> None:
        """Ends ``run`` without a word, as if the process had died."""
        self._ended = True

    def run(self, controller: Controller) -> None:
        """Lets ``controller`` handle events until the run ends."""
        self._layout = controller.terms.layout
        self._timeline.start()
        with ExitStack() as ends:  # the last one first, whatever the loop or one of them raises
            ends.callback(self.endpoint.close)
            ends.callback(self._timeline.close)
            ends.callback(self._writer.shutdown)
            self._drive(controller)

    def _drive(self, controller: Controller) -> None:
        next_tick = steady_time() + self._tick_seconds
        while not self._ended:
            event, next_tick = self._next_event(next_tick)
            now = steady_time()
            match event:
                case Joined(worker=worker, address=address) | Here(worker=worker, address=address):
                    self.endpoint.connect({worker: address})
                case Measured(worker, seconds=seconds):
                    self.measured[worker] = event
                    self.recorder.waited_for_data(seconds.get("wait_data", 0.0))
                case Finished(generation=generation) if generation == controller.generation:
                    self.recorder.writing_checkpoint(now)
            outputs = controller.handle(event, now)
            if controller.plan is not None and controller.plan is not self.plan:
                self.recorder.plan(controller.plan, now)
                members = controller.members
                self.measured = {worker: what for worker, what in self.measured.items() if worker in members}
            self._tell_metrics(event, controller)
            self.plan = controller.plan
            for output in outputs:
                self._carry_out(output, now)
            if any(isinstance(output, Send) and isinstance(output.command, Resume) for output in outputs):
                controller.handle(CommandsSent(), steady_time())

    def _tell_metrics(self, event: Input, controller: Controller) -> None:
        metrics, plan = self.recorder.metrics, controller.plan
        if plan is not None and (plan is not self.plan or isinstance(event, Lost)):
            metrics.observe_members(worker for worker in plan.workers if worker in controller.members)
        if isinstance(event, Measured):
            metrics.observe_worker(event, controller.speeds.of(event.worker))

    def _next_event(self, next_tick: float) -> tuple[Input, float]:
        """The next event and when the clock is to tick again. A busy queue does not hold up the clock."""
        now = steady_time()
        if now < next_tick:
            with suppress(queue.Empty):
                return self._events.get(timeout=next_tick - now), next_tick
        return Tick(), steady_time() + self._tick_seconds

    def _carry_out(self, output: Output, now: float) -> None:
        match output:
            case Send(worker, command):
                try:
                    self.endpoint.send(worker, Tag(0, 0, 0, CONTROL), note=command)
                except Interrupted:
                    raise AssertionError("nobody interrupts the controller") from None
            case Hire(worker):
                if self.crew is not None:
                    self.crew.hire(worker)
            case Dismiss(worker):
                if self.crew is not None:
                    self.crew.dismiss(worker)
            case Note(event):
                self.recorder.event(event, now)
                self._timeline.note(event)
            case TakenBack(version):
                self.recorder.take_back(version)
            case Committed(record):
                self.recorder.step(record, now)
            case WriteManifest():
                self._writer.submit(self._write_manifest, output)
            case End(outcome, message):
                self._ended = True
                self.recorder.finish(outcome, message, steady_time())

    def _write_manifest(self, order: WriteManifest) -> None:
        now = steady_time()
        began = min(now, self.recorder.committed_at(order.version) or now)
        try:
            manifest = write_manifest(
                self._root,
                order.version,
                self._layout,
                order.files,
                exponents=order.exponents,
                recipe=self._recipe,
            )
        except Exception as error:  # whatever it is: the controller waits for an answer
            problem = f"the checkpoint of step {order.version} was not finished: {error}"
            self.recorder.event(CheckpointSkipped(problem), steady_time())
            self.post(ManifestFailed(order.version))
            return
        now = steady_time()
        self.recorder.event(CheckpointWritten(order.version, manifest.bytes, now - began), now)
        # only now: with the last one the run ends, and so does its record
        self.post(ManifestWritten(Durable(order.version, self._root, order.exponents)))
        with suppress(OSError):  # what stays too long is deleted after the next one
            prune(self._root, self._keep, read_back=False)
