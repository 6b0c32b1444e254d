"""What controller and workers say to each other on the control channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from runtime.checkpoint import ShardFile
from runtime.events import StateSource, StepRecord
from runtime.fabric.notes import carry
from runtime.plan import Keeping, Plan, Shard, Stage, Strategy, WorkerId
from runtime.resharding import Holding, Transfer
from runtime.salvage import Salvage, Status, WorkerProgress

Exponents = tuple[int, ...] | None
"""Scale exponents of every tensor; None before the probing pass."""


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Controller to worker: leave what you wait for and report what you hold."""

    generation: int
    lost: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True)
class Resume:
    """Controller to worker: go on from ``version`` completed steps under ``plan``.

    ``transfers`` are all transfers of the change; a worker picks its own. ``checkpoint`` names the
    manifest's directory when state comes from there. ``record`` is the unfinished record of step
    ``version``, which some members may never have seen. With ``salvage`` the step after ``version`` is not
    begun anew.
    """

    plan: Plan
    version: int
    source: StateSource
    addresses: Mapping[WorkerId, str]
    transfers: tuple[Transfer, ...]
    exponents: Exponents
    stop_at: int
    checkpoint: str | None = None
    record: StepRecord | None = None
    salvage: Salvage | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """Controller to worker: go over to ``plan`` at the next step boundary, with no work lost.

    Sent to every member of the old plan and of the new one. The old plan's members agree on the boundary
    in their exchange: it comes after the first step in which all of them have said that they know of this
    change. The ``usher``, the first of them, then tells the newcomers where they come in (``Entry``).
    ``transfers`` move the state as it is at that boundary, from the old plan's owners and holders.
    """

    plan: Plan
    addresses: Mapping[WorkerId, str]
    transfers: tuple[Transfer, ...]
    stop_at: int
    usher: WorkerId


@dataclass(frozen=True, slots=True)
class Entry:
    """Worker to newcomer: the change takes place after ``version`` completed steps."""

    version: int
    exponents: Exponents
    record: StepRecord | None


@dataclass(frozen=True, slots=True)
class Probe:
    """Controller to worker: nothing has moved for a while, find out whom you still hear.

    Every worker greets all ``peers`` and tells which of them it has heard after ``seconds``.
    """

    number: int
    peers: tuple[WorkerId, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Greeting:
    """Worker to worker, on the control channel: the answer to ``Probe`` ``number``."""

    number: int


@dataclass(frozen=True, slots=True)
class Echo:
    """Worker to worker, on the control channel, with or without tensors: answer at once.

    ``address`` is the sender's: a newcomer's peer hears from it before it is told of it.
    """

    number: int
    address: str


@dataclass(frozen=True, slots=True)
class Echoed:
    """Worker to worker: the answer to ``Echo`` ``number``."""

    number: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Controller to worker: end the run at the next step boundary that all agree on."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Controller to worker: the run is over, or you were fenced out; let go of everything."""

    reason: str


Command = Interrupt | Resume | Change | Probe | Stop | Leave


@dataclass(frozen=True, slots=True)
class Held:
    """Worker to controller: what I hold, in answer to ``Interrupt``.

    ``working`` maps a block to the version of its full working parameters; ``exponents`` has an
    entry for every version held; ``ages[v]`` tells how many seconds ago this worker began the step that
    follows version v, for the last few steps. ``records`` are the last steps' whole records, ``unfinished``
    those that still lack what the next exchange says of their result. ``progress`` is what this worker has
    reached in an unfinished step.
    """

    worker: WorkerId
    generation: int
    holdings: tuple[Holding, ...]
    working: Mapping[int, int]
    exponents: Mapping[int, Exponents]
    ages: Mapping[int, float]
    records: tuple[StepRecord, ...] = ()
    unfinished: tuple[StepRecord, ...] = ()
    progress: WorkerProgress | None = None


@dataclass(frozen=True, slots=True)
class Here:
    """Worker to a controller that was started anew: who I am and where I stand.

    ``plan`` is the one that I follow, None before the first; ``pending`` the generation of a change that
    I know of and that has not taken place; ``version`` counts the steps that I committed. ``settled``: nobody
    owes me anything of the move to my plan.
    """

    worker: WorkerId
    address: str
    domain: str
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    generation: int
    plan: Plan | None = None
    pending: int | None = None
    version: int = 0
    records: tuple[StepRecord, ...] = ()
    settled: bool = True


@dataclass(frozen=True, slots=True)
class Beat:
    """Worker to controller, a few times a second: I am alive.

    ``progress`` grows with whatever the worker does; ``computing`` is for how many seconds it has been
    inside one layer, one read of data or one update, 0.0 while it waits for others.
    """

    worker: WorkerId
    progress: int
    computing: float


@dataclass(frozen=True, slots=True)
class Heard:
    """Worker to controller: the answer to ``Probe`` ``number``, the peers that were heard."""

    worker: WorkerId
    number: int
    peers: frozenset[WorkerId]


@dataclass(frozen=True, slots=True)
class Linked:
    """Worker to controller: what my link to ``peer`` takes for a message, however short, and then carries."""

    worker: WorkerId
    peer: WorkerId
    seconds_per_message: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Moved:
    """Worker to controller: under way again in ``generation``. Seconds and bytes of the move."""

    worker: WorkerId
    generation: int
    seconds: float
    bytes_received: int


@dataclass(frozen=True, slots=True)
class Settled:
    """Worker to controller: all state that the change to ``generation`` owed me has come."""

    worker: WorkerId
    generation: int


@dataclass(frozen=True, slots=True)
class Leaving:
    """Worker to controller: I was told to go (a signal, say). ``deadline`` is in seconds from now."""

    worker: WorkerId
    reason: str
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Stepped:
    """Worker to controller: a step was committed. Told by ``Plan.reporters``."""

    worker: WorkerId
    record: StepRecord


@dataclass(frozen=True, slots=True)
class Measured:
    """Worker to controller: seconds per micro-batch and layer, and where a step's time went.

    ``fabric_bytes`` are those sent and received since the worker began. ``step_flops`` is what the model
    computes in a whole step, on all workers together; ``peak_flops`` what this worker's device can do in a
    second. Both are None where they are not known.
    """

    worker: WorkerId
    step: int
    forward: Mapping[int, float]
    backward: Mapping[int, float]
    seconds: Mapping[str, float] = field(default_factory=dict)
    resident_bytes: Mapping[str, int] = field(default_factory=dict)
    fabric_bytes: Mapping[str, int] = field(default_factory=dict)
    step_flops: int | None = None
    peak_flops: float | None = None


@dataclass(frozen=True, slots=True)
class Timed:
    """Worker to controller: what it did since it told of the last step (``runtime.spans`` packs and unpacks
    it). A step that was interrupted is part of what is told of the one that was committed in the end.

    ``offset`` makes the spans' clock nanoseconds since 1970; ``dropped`` spans found no room. No decision
    depends on it: it is for people, and never reaches the controller's transitions.
    """

    worker: WorkerId
    step: int
    generation: int
    offset: int
    spans: bytes
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Repeated:
    """Worker to controller: a gradient outgrew its scale, the step is computed again."""

    worker: WorkerId
    step: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Written:
    """Worker to controller: my shards' part of the checkpoint of ``version`` is on disk."""

    worker: WorkerId
    generation: int
    version: int
    exponents: Exponents
    file: ShardFile


@dataclass(frozen=True, slots=True)
class Unwritten:
    """Worker to controller: my part of a checkpoint could not be written. Training goes on."""

    worker: WorkerId
    version: int
    problem: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Worker to controller: I stopped at ``version``, everything of mine is written."""

    worker: WorkerId
    generation: int
    version: int


@dataclass(frozen=True, slots=True)
class PeerLost:
    """Worker to controller: my link to ``peer`` broke."""

    worker: WorkerId
    peer: WorkerId
    reason: str


@dataclass(frozen=True, slots=True)
class Failing:
    """Worker to controller: the user's code or data raised; going on would only repeat it."""

    worker: WorkerId
    error: str


@dataclass(frozen=True, slots=True)
class Injecting:
    """Worker to controller, just before it injects a fault into itself: when (``time.time()``).

    For the record alone: detection does not use it.
    """

    worker: WorkerId
    step: int
    where: str
    signal: str
    at: float


Report = (
    Held
    | Here
    | Beat
    | Heard
    | Linked
    | Moved
    | Settled
    | Leaving
    | Stepped
    | Measured
    | Repeated
    | Written
    | Unwritten
    | Finished
    | PeerLost
    | Failing
    | Injecting
)

# what all of these are made of; whatever else comes from the network is no message
carry(*get_args(Command), *get_args(Report), Echo, Echoed, Entry, Greeting, Timed, shared=(Plan,))
carry(Holding, Keeping, Salvage, Shard, ShardFile, Stage, Status, StepRecord, Strategy)
carry(Transfer, WorkerProgress)
