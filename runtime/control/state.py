"""What the controller knows of its run, and the questions that can be answered from that alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from statistics import median
from typing import Literal

from runtime.change import PlannedChange
from runtime.detection import Disputes, Watch
from runtime.events import (
    StepRecord,
)
from runtime.hiring import Hiring
from runtime.incident import Incident
from runtime.parts import CheckpointParts
from runtime.plan import Member, Plan, WorkerId
from runtime.protocol import (
    Held,
    Here,
    Leave,
    Report,
)
from runtime.signals import (
    Durable,
    End,
    Joined,
    Learn,
    Output,
    PlanChooser,
    PlanGain,
    PlanMender,
    Send,
    Terms,
)
from runtime.speeds import Speeds


class Phase(Enum):
    FORMING = "forming"
    LEARNING = "learning"
    AGREEING = "agreeing"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Notice:
    """A worker is to leave. ``since`` is when that was known, by the controller's clock."""

    reason: str
    since: float


@dataclass
class ControllerState:
    """``members`` are the workers that are ready, with or without work: those that wait in reserve are among
    them, and those that are to leave until nobody needs what they hold.
    """

    terms: Terms
    choose_plan: PlanChooser
    plan_gain: PlanGain | None = None
    mend_plan: PlanMender | None = None
    phase: Phase = Phase.FORMING
    generation: int = 0
    plan: Plan | None = None
    members: dict[WorkerId, Member] = field(default_factory=dict)
    speeds: Speeds = field(default_factory=Speeds)
    next_record: int = 1
    stopping: bool = False
    aim: int | None = None
    _addresses: dict[WorkerId, str] = field(default_factory=dict)
    _fenced: set[WorkerId] = field(default_factory=set)
    _out_of_reach: set[WorkerId] = field(default_factory=set)
    _notices: dict[WorkerId, Notice] = field(default_factory=dict)
    _asked: set[WorkerId] = field(default_factory=set)
    _held: dict[WorkerId, Held] = field(default_factory=dict)
    _here: dict[WorkerId, Here] = field(default_factory=dict)
    _learn: Learn | None = None
    _early: list[Report] = field(default_factory=list)
    _finished: dict[WorkerId, int] = field(default_factory=dict)
    _died_at: dict[WorkerId, float] = field(default_factory=dict)
    _incident: Incident | None = None
    _change: PlannedChange | None = None
    _pause: float = 0.0
    _unsettled: set[WorkerId] = field(default_factory=set)
    _considered: frozenset[WorkerId] = frozenset()
    _weighed: tuple[tuple[WorkerId, float], ...] = ()
    _paused_at: float | None = None
    _cut_off: tuple[WorkerId, ...] = ()
    _cut_off_at: float = 0.0
    _reached: int = 0
    _unwritten: int = -1
    _step_seconds: list[float] = field(default_factory=list)
    _ahead: dict[int, StepRecord] = field(default_factory=dict)
    _probes: int = 0
    _learning_since: float = 0.0
    _asked_at: float = 0.0

    def __post_init__(self) -> None:
        terms = self.terms
        self._parts = CheckpointParts(terms.layout, terms.start)
        self._reached = terms.start.version if terms.start else 0
        self.next_record = self._reached + 1
        self.aim = terms.aim
        first = terms.workers if terms.next_worker is None else terms.next_worker
        self._hiring = Hiring(wanted_of(terms), first, set(terms.starting))
        self._watch = Watch(terms.patience)
        self._disputes = Disputes(terms.patience)

    @property
    def durable(self) -> Durable | None:
        """The newest whole checkpoint."""
        return self._parts.durable

    @property
    def _most(self) -> int | None:
        """How many may have work. None: whoever is there, and those who are lost are not replaced."""
        if self.aim is not None or self.terms.max_workers is None:
            return self.aim
        return max(self.terms.max_workers, self.terms.workers)

    def _chosen(self) -> list[WorkerId]:
        """The members that work is to be divided among: those who stay, no more than there is work for, and
        whoever has work keeps it. Where too few stay, as many with a notice as are missing work on."""
        at_work = set(self.plan.workers) if self.plan else set()
        staying = [worker for worker in self.members if worker not in self._notices]
        leaving = [worker for worker in self.members if worker in self._notices]
        missing = max(self.terms.min_workers - len(staying), 0)
        staying += sorted(leaving, key=lambda worker: (worker not in at_work, worker))[:missing]
        staying.sort(key=lambda worker: (worker not in at_work, worker))
        return sorted(staying[: self._most])

    def _planning_members(self) -> list[Member]:
        return [replace(self.members[w], speed=self.speeds.of(w)) for w in self._chosen()]

    def _next_plan(self) -> Plan:
        members = self._planning_members()
        self._considered = frozenset(member.worker for member in members)
        self._weighed = speeds_of(members)
        return self.choose_plan(self.generation, members, self.speeds, self.plan)

    def _admit(self, event: Joined | Here) -> None:
        self.members[event.worker] = Member(event.worker, event.domain)
        self._addresses[event.worker] = event.address
        self.speeds.warm_up(event.forward, event.backward)

    def _hire(self, now: float) -> list[Output]:
        if self.phase in (Phase.FORMING, Phase.LEARNING, Phase.ENDED) or self.stopping:
            return []
        return list(self._hiring.orders(len(self.members) - len(self._notices), now))

    def _with_a_part(self) -> set[WorkerId]:
        """The members that the present plan, a change under way or a move still needs."""
        needed = set(self.plan.workers) if self.plan else set()
        if self._change is not None:
            needed.update(self._change.concerned)
        if self._unsettled or self.phase in (Phase.AGREEING, Phase.PAUSED):
            needed.update(self._notices)
        return needed

    def _median_step(self) -> float:
        return median(self._step_seconds) if self._step_seconds else 0.0

    def _end(self, outcome: Literal["completed", "interrupted", "failed"], message: str) -> list[Output]:
        self.phase = Phase.ENDED
        leaving: list[Output] = [Send(worker, Leave(message)) for worker in sorted(self.members)]
        return [*leaving, End(outcome, message)]


def wanted_of(terms: Terms) -> int:
    """How many workers are kept ready or on their way."""
    if terms.aim is not None:
        return terms.aim + terms.spares
    if terms.max_workers is None:
        return 0
    useful = terms.max_workers if terms.useful is None else min(terms.useful, terms.max_workers)
    return useful + terms.spares


def speeds_of(members: Sequence[Member]) -> tuple[tuple[WorkerId, float], ...]:
    """Coarse enough that noise does not count as a change."""
    return tuple((member.worker, round(member.speed, 1)) for member in members)
