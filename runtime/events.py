"""What is logged: events of a run, and one record per step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from runtime.plan import WorkerId
from runtime.samples import StepSamples
from runtime.strict import STRICT, read_strictly

if TYPE_CHECKING:
    from pydantic import ConfigDict

StateSource = Literal["peers", "checkpoint", "initial"]
"""Where state came from: other workers' memory, a durable checkpoint, or the initial seed."""

Outcome = Literal["completed", "interrupted", "failed"]


@dataclass(frozen=True)
class _Logged:
    """Read back strictly: a field that this version does not know is an error, not skipped."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT


@dataclass(frozen=True)
class RecoverySeconds(_Logged):
    """Where the seconds of a recovery went."""

    detect: float
    agree: float
    plan: float
    move: float
    redo: float

    @property
    def total(self) -> float:
        return self.detect + self.agree + self.plan + self.move + self.redo


@dataclass(frozen=True)
class RunStarted(_Logged):
    """``from_version`` completed steps lie behind; ``steps`` is where the run is to end."""

    run: str
    steps: int
    workers: int
    stages: int
    from_version: int = 0
    source: StateSource = "initial"


@dataclass(frozen=True)
class WorkerJoined(_Logged):
    """``seconds``: how long the others waited at the step boundary."""

    step: int
    worker: WorkerId
    workers_before: int
    workers_after: int
    seconds: float


@dataclass(frozen=True)
class WorkerLeft(_Logged):
    """A worker that was told to go had no more work to do. ``seconds``: how long the others waited at the
    step boundary; ``notice_seconds``: from the notice until its last state was handed over."""

    step: int
    worker: WorkerId
    reason: str
    workers_before: int
    workers_after: int
    seconds: float
    notice_seconds: float


@dataclass(frozen=True)
class DrainNotice(_Logged):
    """A worker is to go. ``deadline``: seconds until it is taken away, where that is known."""

    step: int
    worker: WorkerId
    reason: str
    deadline: float | None = None


@dataclass(frozen=True)
class Resized(_Logged):
    """A person wants the run to have ``workers`` from now on."""

    step: int
    workers: int


@dataclass(frozen=True)
class DemandCapped(_Logged):
    """No more than ``workers`` of the ``most`` that the recipe allows are asked for: with more, a step is not
    predicted to be shorter."""

    step: int
    workers: int
    most: int


@dataclass(frozen=True)
class Rebalanced(_Logged):
    """The work was divided anew at a step boundary. ``gain`` is the predicted relative gain in speed."""

    step: int
    reason: str
    gain: float
    seconds: float
    moved_bytes: int


@dataclass(frozen=True)
class ControllerRestarted(_Logged):
    """The controller died and a new one took over; ``seconds``: for how long nobody watched."""

    step: int
    workers: int
    seconds: float


@dataclass(frozen=True)
class WorkerLost(_Logged):
    """``idle``: it had no work, so that nobody had to be interrupted."""

    step: int
    worker: WorkerId
    reason: str
    idle: bool = False


@dataclass(frozen=True)
class Recovered(_Logged):
    """Training went on at ``step`` from the state of version ``from_version``.

    ``kept``: the share of the step's forwards and backwards that need not be done again.
    """

    step: int
    lost: tuple[WorkerId, ...]
    reason: str
    workers_before: int
    workers_after: int
    seconds: RecoverySeconds
    source: StateSource
    from_version: int
    moved_bytes: int
    kept: float = 0.0


@dataclass(frozen=True)
class Paused(_Logged):
    """Fewer workers than ``min_workers``: training waits and keeps its state.

    ``cut_off``: workers that do not answer but may live, and hold the only copies of some of the state.
    """

    step: int
    workers: int
    min_workers: int
    cut_off: tuple[WorkerId, ...] = ()


@dataclass(frozen=True)
class Resumed(_Logged):
    """``seconds``: how long training was paused."""

    step: int
    workers: int
    seconds: float


@dataclass(frozen=True)
class CheckpointWritten(_Logged):
    """``seconds``: from its step's commit to the manifest; training went on meanwhile."""

    version: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class CheckpointSkipped(_Logged):
    """A checkpoint that was not written or cannot be used; ``problem`` is a sentence."""

    problem: str


@dataclass(frozen=True)
class RecordLost(_Logged):
    """The run goes on, but what happens is no longer written down; ``problem`` is a sentence."""

    problem: str


@dataclass(frozen=True)
class StepRepeated(_Logged):
    """A gradient outgrew its scale: the step is done again with a smaller one."""

    step: int
    attempt: int


@dataclass(frozen=True)
class FaultInjected(_Logged):
    """The recipe's fault: ``at`` is the moment in the step, ``signal`` what the worker got."""

    step: int
    worker: WorkerId
    at: str
    signal: str


@dataclass(frozen=True)
class FeedWorkerLost(_Logged):
    """One of those that prepare data is gone; workers prepare what it owed them by themselves."""

    step: int
    feed_worker: int
    reason: str


@dataclass(frozen=True)
class FeedWorkerReplaced(_Logged):
    """``seconds``: from the loss until the new one answered."""

    step: int
    feed_worker: int
    seconds: float


@dataclass(frozen=True)
class RunFinished(_Logged):
    """``step`` completed steps. ``detail`` says why, where the outcome is not "completed"."""

    outcome: Outcome
    step: int
    workers: int
    seconds: float
    goodput: float
    detail: str = ""


Event = (
    RunStarted
    | WorkerJoined
    | WorkerLeft
    | DrainNotice
    | Resized
    | DemandCapped
    | Rebalanced
    | ControllerRestarted
    | WorkerLost
    | Recovered
    | Paused
    | Resumed
    | CheckpointWritten
    | CheckpointSkipped
    | RecordLost
    | StepRepeated
    | FaultInjected
    | FeedWorkerLost
    | FeedWorkerReplaced
    | RunFinished
)

KINDS: Mapping[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


@dataclass(frozen=True)
class StepRecord(_Logged):
    """One committed step.

    ``loss`` and ``held_out_loss`` are means per sample or token, ``half_depth_loss`` as the latter with every
    other stage left out (runs with paths only), ``fingerprint`` is that of the
    parameters after the step (modulo 2^64), ``attempts`` counts the tries (1: at once),
    ``committed_at`` is the reporting worker's clock (seconds since 1970). ``read``: which samples its
    micro-batches were made of, where the data set tells; it goes to a file of its own.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    samples: int
    tokens: int
    seconds: float
    workers: int
    generation: int
    fingerprint: int
    held_out_loss: float | None = None
    attempts: int = 1
    committed_at: float = 0.0
    read: StepSamples = ()
    half_depth_loss: float | None = None


def to_json(event: Event) -> dict[str, Any]:
    """``{"kind": class name, field: value, ...}``, of JSON values."""
    return {"kind": type(event).__name__, **asdict(event)}


def from_json(record: Mapping[str, Any]) -> Event:
    """Raises ValueError for an unknown kind and for missing, unknown or ill-typed fields."""
    values = dict(record)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of event; known are {', '.join(KINDS)}")
    return read_strictly(KINDS[kind], values)


def step_to_json(record: StepRecord) -> dict[str, Any]:
    """All but ``read``. The fingerprint becomes 16 hexadecimal digits: many JSON readers round integers to
    53 bits."""
    values = asdict(replace(record, read=()))
    del values["read"]
    return {**values, "fingerprint": f"{record.fingerprint:016x}"}


def step_from_json(record: Mapping[str, Any]) -> StepRecord:
    """Raises ValueError as ``from_json`` does."""
    values = dict(record)
    if isinstance(values.get("fingerprint"), str):
        values["fingerprint"] = int(values["fingerprint"], 16)
    return read_strictly(StepRecord, values)
