"""What a job computes, in terms that every worker understands. Picklable; made by ``jobs``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from runtime.plan import Plan
from strategies.engine import EngineSettings
from strategies.options import WHOLE, Keeps, Offload, OptimizerSettings, Precision
from strategies.schedules.registry import DEFAULT
from strategies.search.space import Space
from strategies.shardings.registry import DEFAULT as SHARDING
from strategies.shardings.registry import SHARDINGS, Entry
from strategies.skippipe.paths import Paths

if TYPE_CHECKING:  # the controller has the job too, and no PyTorch
    from strategies.model import ModelBuilder
    from strategies.pipeline import Data


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that worker ``worker`` injects into itself in step ``step`` at ``at``.

    ``at`` names a place in the step: forward, backward, reduce, exchange, optimizer, gather, backup,
    checkpoint or recovery. ``micro_batch`` narrows forward and backward down (None: the first one).
    """

    worker: int
    step: int
    at: str
    micro_batch: int | None = None
    signal: str = "SIGKILL"


@dataclass(frozen=True)
class Job:
    """Everything that the bits of a run depend on, and where its checkpoints go.

    Steps count from 1; step t turns version t - 1 of the parameters into version t. ``checkpoint_every`` and
    ``held_out_every`` are in steps, 0 for never (a checkpoint at the end is written always);
    ``tokens_per_sample`` is for display. ``salvage``: an interrupted step keeps what survivors have summed
    (exact sums only). ``schedule``: a name of ``schedules.registry``, for workers of ``chunks`` stages each.
    ``paths``: micro-batches pass only some stages, or in another order. ``sharding``: a name of
    ``shardings.registry``, where ``search`` does not choose it; ``offload``: parameters are in host memory
    and come to the device as they are needed. ``feed_workers`` prepare data for those that train; 0: these
    read by themselves. ``sequence_slices``: where more than one, layers are computed in so many slices
    (``strategies.sequence``), by teams of up to ``sequence`` workers or as a search wants them. ``search``:
    what every plan may choose anew, within ``worker_memory_bytes`` (None: plenty; ``host_state``: shards are
    elsewhere) and with links of ``link_bytes_per_second``; None: nothing. With an ``engine`` the steps are
    computed by DeepSpeed; ``precision``, ``reduction``, ``schedule`` and ``salvage`` then mean nothing, and
    ``optimizer`` only what the engine's own configuration leaves open.
    """

    build_model: ModelBuilder
    build_data: Callable[[], Data]
    seed: int
    steps: int
    micro_batches: int
    micro_batch_size: int
    optimizer: OptimizerSettings
    precision: Precision = field(default_factory=Precision)
    reduction: Literal["exact", "fast"] = "exact"
    salvage: bool = True
    schedule: str = DEFAULT
    chunks: int = 1
    paths: Paths | None = None
    sharding: str = SHARDING
    offload: Offload | None = None
    sequence: int = 1
    sequence_slices: int = 1
    threads: int = 1
    search: Space | None = None
    worker_memory_bytes: int | None = None
    link_bytes_per_second: float = 1e9
    host_state: bool = False
    feed_workers: int = 0
    held_out_every: int = 0
    held_out_micro_batches: int = 0
    checkpoint_every: int = 0
    checkpoint_root: str = ""
    tokens_per_sample: int = 0
    inbox_limit_bytes: int = 256 << 20
    faults: tuple[Fault, ...] = ()
    beat_seconds: float = 0.2
    orphan_seconds: float = 30.0
    engine: EngineSettings | None = None

    def sharding_under(self, plan: Plan) -> Entry:
        """That of the plan's own strategy where it was searched for."""
        return SHARDINGS[self.sharding if plan.strategy is None else plan.strategy.sharding]

    def salvages_under(self, plan: Plan) -> bool:
        """Whether an interrupted step can go on from what survivors have of it, unless its plan has teams."""
        in_place = self.sharding_under(plan).salvages and self.sequence == 1
        return self.salvage and self.reduction == "exact" and in_place

    def keeps_under(self, plan: Plan | None = None) -> Keeps:
        """What a worker's stage has in memory all the time; None: before there is a plan."""
        keeps = WHOLE if plan is None else self.sharding_under(plan).keeps
        return keeps if self.offload is None else replace(keeps, streams=True)
