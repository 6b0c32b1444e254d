"""Drives the real controller in simulated time; the twin of ``actors.host.Host``."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Protocol

from runtime.controller import Controller
from runtime.events import Event, WorkerLeft, WorkerLost
from runtime.fabric.interface import CONTROL, Message, Tag
from runtime.plan import WorkerId
from runtime.protocol import Change, Interrupt, Resume
from runtime.signals import (
    CommandsSent,
    Committed,
    Dismiss,
    End,
    Hire,
    Input,
    Joined,
    Lost,
    ManifestWritten,
    Note,
    Output,
    Send,
    TakenBack,
    Tick,
    WriteManifest,
)
from runtime.simulation.checks import Checks, check
from runtime.simulation.endpoint import SimEndpoint
from runtime.simulation.journal import Journal
from runtime.simulation.network import Network
from runtime.simulation.process import Process
from runtime.simulation.storage import Record, Storage

TICK_SECONDS = 0.2
MANIFEST_SECONDS = 0.1


class SimCrew(Protocol):
    """Who brings workers and sees them off."""

    def hire(self, worker: WorkerId) -> None: ...

    def dismiss(self, worker: WorkerId) -> None: ...

    def knows_record(self, step: int) -> bool: ...

    @property
    def living(self) -> Collection[WorkerId]: ...


class SimHost:
    """One controller's process. ``end`` is what the run ended with, None before."""

    def __init__(
        self,
        identity: WorkerId,
        controller: Controller,
        process: Process,
        network: Network,
        crew: SimCrew,
        storage: Storage,
        record: Record,
        checks: Checks,
        journal: Journal | None = None,
    ) -> None:
        self.identity, self.controller, self.process = identity, controller, process
        self.end: End | None = None
        self.journal = journal
        self.interrupts = 0
        self.joined: dict[WorkerId, int] = {}
        """The newest step on record when each worker was ready."""
        self._crew, self._storage, self._record, self._checks = crew, storage, record, checks
        self._durable = None if controller.durable is None else controller.durable.version
        if controller.terms.start is not None:
            self._durable = controller.terms.start.version
        self.endpoint = SimEndpoint(identity, network, process, self._on_control, self._on_lost)
        process.after(TICK_SECONDS, self._tick)

    def post(self, event: Input) -> None:
        """Something happens outside the fabric."""
        self.process.do(partial(self._handle, event))

    def _on_control(self, message: Message) -> None:
        self._handle(message.note)

    def _on_lost(self, peer: WorkerId, reason: str) -> None:
        if peer >= 0:
            self._handle(Lost(peer, f"process died or cut off: {reason}", confirmed=False))

    def _tick(self) -> None:
        self._handle(Tick())
        if self.end is None:
            self.process.after(TICK_SECONDS, self._tick)

    def _handle(self, event: Input) -> None:
        if self.end is not None:
            return
        controller, now = self.controller, self.process.clock.now
        before = controller.generation
        if isinstance(event, Joined):
            self.joined[event.worker] = self._record.recorded
        if self.journal:
            self.journal.heard(now, event)
        outputs = controller.handle(event, now)
        if self.journal:
            self.journal.did(now, outputs)
        check(controller.generation >= before, "the generation runs backwards")
        for output in outputs:
            self._carry_out(output)
        if any(isinstance(output, Send) and isinstance(output.command, Resume) for output in outputs):
            controller.handle(CommandsSent(), now)

    def _carry_out(self, output: Output) -> None:
        match output:
            case Send(worker, command):
                self._check_command(command)
                self.endpoint.send(worker, Tag(0, 0, 0, CONTROL), command)
            case Hire(worker):
                self._crew.hire(worker)
            case Dismiss(worker):
                self._crew.dismiss(worker)
            case Note(event):
                self._note(event)
            case TakenBack(version):
                self._checks.take_back(version)
                self._record.take_back(version)
            case Committed(record):
                missing = range(self._checks.recorded + 1, record.step)
                self._checks.record(record, any(self._crew.knows_record(step) for step in missing))
                self._record.steps.append(record)
            case WriteManifest():
                delay = self.process.random.uniform(0.0, MANIFEST_SECONDS)
                self.process.after(delay, partial(self._write_manifest, output))
            case End():
                self.end = output

    def _note(self, event: Event) -> None:
        self._record.events.append((self.process.clock.now, event))
        match event:
            case WorkerLost(worker=worker):
                self._checks.lose(worker)
            case WorkerLeft(worker=worker):
                self._checks.released(worker)

    def _check_command(self, command: object) -> None:
        """One command goes to many; it is checked when the first of them gets it."""
        controller = self.controller
        match command:
            case Interrupt(generation) if generation > self._checks.generation:
                self.interrupts += 1
                self._checks.interrupted(generation)
            case Resume(plan) if not self._checks.knows(plan):
                self._checks.resumed(
                    command, controller.members, self._crew.living, self._durable, controller.stopping
                )
            case Change(plan) if not self._checks.knows(plan):
                self._checks.changed(command, controller.members, controller.stopping)

    def _write_manifest(self, order: WriteManifest) -> None:
        durable = self._storage.write_manifest(order.version, order.files, order.exponents)
        self._durable = max(durable.version, self._durable or 0)
        self._handle(ManifestWritten(durable))
