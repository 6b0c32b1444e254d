"""The side of a simulated worker that listens to the controller and tells it things.

What the real worker's receiver, heartbeat and timer threads do (``actors.worker``); the main thread's part
is in ``simulation.worker``.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from runtime.events import StepRecord
from runtime.fabric.interface import CONTROL, EndpointClosed, Interrupted, Message, Tag
from runtime.plan import CONTROLLER, Plan, WorkerId
from runtime.protocol import (
    Beat,
    Change,
    Greeting,
    Heard,
    Here,
    Interrupt,
    Leave,
    Leaving,
    PeerLost,
    Probe,
    Report,
    Resume,
    Stop,
)
from runtime.simulation.endpoint import SimEndpoint
from runtime.simulation.network import Network
from runtime.simulation.process import Process
from runtime.simulation.toy import ToyModel

NEVER = 1 << 62
"""A generation that no plan has."""


@dataclass(frozen=True)
class SimJob:
    """Seconds per layer and micro-batch, forward; backward takes twice as long. ``split_backward``: weight
    gradients are put off, as zero-bubble schedules do."""

    model: ToyModel
    steps: int
    checkpoint_every: int = 0
    layer_seconds: float = 0.004
    beat_seconds: float = 0.2
    orphan_seconds: float = 30.0
    salvage: bool = True
    split_backward: bool = False


class ControlEnd:
    """Commands that have come, reports that go out, and where the worker stands."""

    def __init__(
        self, worker: WorkerId, job: SimJob, domain: str, process: Process, network: Network
    ) -> None:
        self.worker, self.job, self.domain, self.process = worker, job, domain, process
        self.model = job.model
        self.stop_requested = False
        self._commands: deque[Interrupt | Resume | Change | Leave] = deque()
        self._controller: WorkerId = CONTROLLER
        self._controller_lost_at: float | None = None
        self._plan: Plan | None = None
        self._pending: Change | None = None
        self.settled = True
        self._version = 0
        self._whole: dict[int, StepRecord] = {}
        self._notice: Leaving | None = None
        self._untold: list[Report] = []
        self._heard: dict[int, set[WorkerId]] = {}
        self._gone: set[WorkerId] = set()
        self._progress = 0
        self._computing_since: float | None = None
        self.endpoint = SimEndpoint(worker, network, process, self._on_control, self._on_lost)
        process.after(job.beat_seconds, self._beat)

    def _on_control(self, message: Message) -> None:
        command = message.note
        if message.sender < 0 and message.sender != self._controller:
            return  # of a controller that has been replaced
        match command:
            case Stop():
                self.stop_requested = True
            case Interrupt():
                self.endpoint.interrupt(command.generation, command.lost)
                self._put(command)
            case Resume():
                self._put(command)
            case Change():
                if self._plan is not None and self.worker in self._plan.workers:
                    self._pending = command
                else:
                    self._put(command)
            case Probe():
                self._answer(command)
            case Greeting(number):
                self._heard.setdefault(number, set()).add(message.sender)
            case Leave():
                self._dismiss(command)

    def _put(self, command: Interrupt | Resume | Change | Leave) -> None:
        self._commands.append(command)
        self.process.wake()

    def _answer(self, probe: Probe) -> None:
        for peer in probe.peers:
            if peer != self.worker:
                self.endpoint.send(peer, Tag(0, 0, 0, CONTROL), Greeting(probe.number))

        def tell() -> None:
            self.tell(Heard(self.worker, probe.number, frozenset(self._heard.pop(probe.number, ()))))

        self.process.after(probe.seconds, tell)

    def _dismiss(self, leave: Leave) -> None:
        self._put(leave)
        self.endpoint.interrupt(NEVER)

    def _on_lost(self, peer: WorkerId, reason: str) -> None:
        if peer >= 0:
            self._gone.add(peer)
            self.tell(PeerLost(self.worker, peer, reason))
        elif peer == self._controller:
            self._controller_lost_at = self.process.clock.now

    def tell(self, report: Report) -> None:
        with suppress(EndpointClosed, Interrupted):
            self.endpoint.send(self._controller, Tag(0, 0, 0, CONTROL), report)

    def tell_surely(self, report: Report) -> None:
        self._untold.append(report)
        self.tell(report)

    def forget_untold(self) -> None:
        """What was to be told again is of no use any more."""
        self._untold = []

    def follow(self, controller: WorkerId) -> None:
        """Who the controller is, as a worker is told when it starts."""
        self._controller = controller

    def attach(self, controller: WorkerId) -> None:
        """Another controller has taken over: tells it where this worker stands."""
        if self.endpoint.generation == NEVER:
            return  # sent away already
        self._controller, self._controller_lost_at = controller, None
        layers, seconds = self.model.layout.layers, self.job.layer_seconds
        self.tell(
            Here(
                worker=self.worker,
                address=f"simulated:{self.worker}",
                domain=self.domain,
                forward=(seconds,) * layers,
                backward=(2 * seconds,) * layers,
                generation=self.endpoint.generation,
                plan=self._plan,
                pending=None if self._pending is None else self._pending.plan.generation,
                version=self._version,
                records=tuple(self._whole.values()),
                settled=self.settled,
            )
        )
        for report in list(self._untold):
            self.tell(report)
        for peer in sorted(self._gone):
            self.tell(PeerLost(self.worker, peer, "lost while there was no controller"))
        if self._notice is not None:
            self.tell(self._notice)

    def notice(self, reason: str, deadline: float | None) -> None:
        """A signal tells this worker to go."""
        self._notice = Leaving(self.worker, reason, deadline)
        self.tell(self._notice)

    def _beat(self) -> None:
        if self.endpoint.closed:
            return
        since, lost_at, now = self._computing_since, self._controller_lost_at, self.process.clock.now
        if lost_at is None:
            self.tell(Beat(self.worker, self._progress, 0.0 if since is None else now - since))
        elif now - lost_at > self.job.orphan_seconds:
            self._dismiss(Leave("there was no controller"))
            return
        self.process.after(self.job.beat_seconds, self._beat)

    def pending_generation(self) -> int:
        """The generation of the change of plan that this worker knows of, or 0."""
        return 0 if self._pending is None else self._pending.plan.generation
