"""What goes into the controller and what comes out of it: immutable values, no behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from runtime.checkpoint import ShardFile
from runtime.detection import Patience
from runtime.events import Event, StepRecord
from runtime.layout import Layout
from runtime.plan import Member, Plan, WorkerId
from runtime.protocol import Command, Exponents, Report
from runtime.salvage import Salvage, WorkerProgress
from runtime.speeds import Speeds


@dataclass(frozen=True, slots=True)
class Durable:
    """A whole checkpoint: the state after ``version`` steps, in the folder ``path``."""

    version: int
    path: str
    exponents: Exponents


@dataclass(frozen=True)
class Terms:
    """What the controller is told of a job. ``start`` is the checkpoint to begin from, if any.

    The run is formed of ``workers``. From then on the controller asks for as many as are missing to
    ``max_workers`` (None: for none), and for ``spares`` more that stand by, warmed up; they are numbered
    from ``next_worker`` on (default: from ``workers``). ``useful``: no more than these are asked for, because
    further ones are not predicted to make a step shorter (at least ``workers``). ``aim``: how many a person
    has asked for since; it takes the place of ``max_workers``, and is taken at its word. ``starting``: those
    of the first workers that Ray has yet to find room for; the run is formed without them, and they join.
    """

    run: str
    layout: Layout
    steps: int
    workers: int
    min_workers: int
    start: Durable | None = None
    max_workers: int | None = None
    spares: int = 0
    next_worker: int | None = None
    aim: int | None = None
    useful: int | None = None
    starting: tuple[WorkerId, ...] = ()
    patience: Patience = field(default_factory=Patience)


PlanChooser = Callable[[int, Sequence[Member], Speeds, Plan | None], Plan]
"""(generation, members, measured speeds, previous plan) -> plan. Pure. A member that would only slow the
others down may be left out."""

PlanGain = Callable[[Plan, Plan, Sequence[Member], Speeds], float]
"""(present plan, other plan, members, measured speeds) -> by how much the other one's steps are predicted to
be faster, relative: 0.1 = a tenth. Pure."""


PlanMender = Callable[
    [int, Sequence[Member], Speeds, Plan, int, Mapping[WorkerId, WorkerProgress]], tuple[Plan, Salvage] | None
]
"""(generation, members, measured speeds, the interrupted plan, the interrupted step, the survivors' progress)
-> the plan to finish the step under and what it keeps; None where doing the step again is as good. Pure."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker is ready. Seconds per layer and micro-batch come from its warm-up."""

    worker: WorkerId
    domain: str
    address: str
    forward: Sequence[float]
    backward: Sequence[float]


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker's process died, or it was given up. ``reason`` is shown to people.

    ``confirmed``: the process is known to have ended; else it may live and only be out of reach.
    """

    worker: WorkerId
    reason: str
    confirmed: bool = True


@dataclass(frozen=True, slots=True)
class Drain:
    """``worker`` is to leave at the next step boundary; ``deadline`` is in seconds from now, if known."""

    worker: WorkerId
    reason: str
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Resize:
    """A person wants the run to have ``workers``, a number that ``problem_of_size`` has nothing against."""

    workers: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; comes several times a second."""


@dataclass(frozen=True, slots=True)
class Learn:
    """A controller that was started anew begins to learn from the living ``workers`` where they stand.

    ``recorded`` is the newest step on record, ``away`` for how many seconds nobody watched, ``next_worker``
    the lowest id that was never used.
    """

    workers: tuple[WorkerId, ...]
    recorded: int
    away: float
    next_worker: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """A person wants the run to end at the next step boundary, with a checkpoint."""


@dataclass(frozen=True, slots=True)
class CommandsSent:
    """The commands of the last ``handle`` are out; what came before was planning."""


@dataclass(frozen=True, slots=True)
class ManifestWritten:
    """The checkpoint of ``durable.version`` is whole."""

    durable: Durable


@dataclass(frozen=True, slots=True)
class ManifestFailed:
    """The checkpoint of ``version`` could not be made whole. Training goes on."""

    version: int


Input = (
    Joined
    | Lost
    | Drain
    | Resize
    | Tick
    | Learn
    | StopRequested
    | CommandsSent
    | ManifestWritten
    | ManifestFailed
    | Report
)


@dataclass(frozen=True, slots=True)
class Hire:
    """Ask for a further worker, to be called ``worker``; it joins when there is room and it is warmed up."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class Dismiss:
    """``worker`` was fenced out or has left: see that its process ends, and tell (``Lost``) when it has."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class Send:
    worker: WorkerId
    command: Command


@dataclass(frozen=True, slots=True)
class Note:
    """For the event log, the metrics and the terminal."""

    event: Event


@dataclass(frozen=True, slots=True)
class Committed:
    """A step's record, for the first time."""

    record: StepRecord


@dataclass(frozen=True, slots=True)
class WriteManifest:
    version: int
    exponents: Exponents
    files: tuple[ShardFile, ...]


@dataclass(frozen=True, slots=True)
class End:
    """Nothing more will come. ``message`` says why, in a sentence."""

    outcome: Literal["completed", "interrupted", "failed"]
    message: str


@dataclass(frozen=True, slots=True)
class TakenBack:
    """The run goes on from ``version``: recorded steps after it will be committed again."""

    version: int


Output = TakenBack | Hire | Dismiss | Send | Note | Committed | WriteManifest | End
