"""The recipe: the TOML file that describes a job, checked before anything starts.

A recipe and ``--set key=value`` are the only settings of a job. Everything here is immutable;
``load_recipe`` is the only function that reads a file. Steps count from 1; workers, layers
and micro-batches from 0.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveInt,
    model_validator,
)

from jobs.builders import BUILDER
from jobs.recipe.choices import AUTO, Amount, Degree, Recompute, ScheduleName, check_choices
from jobs.recipe.errors import RecipeError
from jobs.recipe.paths import Paths, check_paths
from jobs.recipe.section import Natural, PositiveFloat, Section
from jobs.recipe.sequence import check_sequence
from jobs.recipe.sharding import ShardingName, check_sharding
from jobs.recipe.table import read_model
from strategies import options
from strategies.schedules.registry import DEFAULT
from strategies.shardings.registry import DEFAULT as SHARDING

__all__ = ["Fault", "Recipe", "RecipeError", "load_recipe"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _check_builder(value: str) -> str:
    if not BUILDER.fullmatch(value):
        raise ValueError('must have the form "package.module:function"')
    return value


def _check_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("names the run's folder: it must be made of letters, digits, '.', '_' and '-'")
    return value


def _check_stages(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError('must be "auto" or a whole number of at least 1')


Builder = Annotated[str, AfterValidator(_check_builder)]
Port = Annotated[int, Field(ge=0, le=65_535)]
Stages = Annotated[int | Literal["auto"], BeforeValidator(_check_stages)]


class Run(Section):
    name: Annotated[str, AfterValidator(_check_name)]
    steps: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Model(Section):
    """``arguments`` are passed to the builder as keyword arguments."""

    build: Builder = "jobs.models.gpt:build"
    arguments: dict[str, Any] = Field(default_factory=dict)


class Data(Section):
    """``held_out_every`` is in steps; 0 never computes the held-out loss. ``feed_workers`` prepare data
    ahead, each on ``feed_cpus`` CPUs; with 0 the workers that train do so themselves. ``show``: a function
    that, called with the run's folder and the version of each checkpoint, returns lines for the terminal."""

    build: Builder = "jobs.data.text:build"
    arguments: dict[str, Any] = Field(default_factory=dict)
    held_out_micro_batches: PositiveInt = 8
    held_out_every: Natural = 0
    feed_workers: Natural = 0
    feed_cpus: Annotated[float, Field(ge=0)] = 1.0
    show: Builder | None = None


class Optimizer(Section):
    """AdamW; warm-up to ``learning_rate``, then a cosine to ``minimum_rate`` times it.

    ``decay_steps`` counts from the first step of the run and defaults to all steps of the run.
    """

    learning_rate: PositiveFloat
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    warmup_steps: Natural = 0
    decay_steps: PositiveInt | None = None
    minimum_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    clip_norm: PositiveFloat | None = None


class Offload(Section):
    """Parameters are in host memory, a window of layers on the device (``strategies.shardings.offload``)."""

    window: PositiveInt = 2
    move: PositiveInt = 1

    @model_validator(mode="after")
    def _fits(self) -> Offload:
        options.Offload(self.window, self.move)
        return self


class Parallel(Section):
    """``threads`` of a CPU worker are part of the result's bits; the other sizes of the cluster are not.

    The run begins with ``workers``. Where ``max_workers`` is given, Ray is asked for as many as are missing
    to it, all the time (lost ones are replaced, and more are taken where there is room and they are predicted
    to help), and for ``spares`` that stand by warmed up. ``rebalance``: measured speeds may divide the work
    anew. ``resources`` are Ray's custom resources that every worker takes up. ``schedule`` orders the
    forwards and backwards of a step; every worker holds ``chunks`` stages. ``sharding`` says who keeps which
    parameters, sums and optimizer states; ``offload`` leaves parameters in host memory. Teams of up to
    ``sequence`` workers of a stage group compute a micro-batch together; its sequence is cut into
    ``sequence_slices`` (as many if not given), on which the result's bits depend. ``memory`` is what every
    worker has (on its GPU, if it has one), for a search to keep to.
    """

    workers: PositiveInt
    min_workers: PositiveInt = 1
    max_workers: PositiveInt | None = None
    spares: Natural = 0
    rebalance: bool = True
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    stages: Stages = "auto"
    schedule: ScheduleName = DEFAULT
    chunks: PositiveInt = 1
    sharding: ShardingName = SHARDING
    offload: Offload | None = None
    sequence: Degree = 1
    sequence_slices: PositiveInt | None = None
    memory: Amount | None = None
    micro_batches: PositiveInt
    micro_batch_size: PositiveInt
    threads: PositiveInt = 1
    gpus_per_worker: Annotated[float, Field(ge=0, le=1)] = 0.0
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0

    @property
    def slices(self) -> int:
        if self.sequence_slices is not None:
            return self.sequence_slices
        return self.sequence if isinstance(self.sequence, int) else 1


class Engine(Section):
    """What computes the steps. ``config`` is the path of a DeepSpeed configuration (JSON), relative to the
    recipe; its content is kept in ``settings``, so that a run's own recipe says everything."""

    name: Literal["reknit", "deepspeed"] = "reknit"
    config: Annotated[str, Field(min_length=1)] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class Precision(Section):
    autocast: Literal["none", "bf16"] = "none"
    recompute: Recompute = "none"


class Checkpoint(Section):
    """``every`` is in steps; 0 writes only the last step's. ``folder`` is a path or a URI."""

    every: Natural = 0
    keep: PositiveInt = 2
    folder: Annotated[str, Field(min_length=1)] | None = None


class Metrics(Section):
    """``port`` 0 takes any free port; ``host`` "0.0.0.0" lets other machines scrape. Prometheus finds the run
    in the folder ``targets`` (default: this user's own, ``reknit monitoring`` names it). ``peak_flops``: what
    one worker's device can do in a second, for one that Reknit does not know."""

    enabled: bool = True
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Port = 0
    targets: Annotated[str, Field(min_length=1)] | None = None
    peak_flops: PositiveFloat | None = None


class Fabric(Section):
    """``inbox_limit_mb`` is in MiB of received tensors that nobody has taken yet; ``link_bytes_per_second``:
    what a search takes a link between two workers to carry."""

    inbox_limit_mb: PositiveInt = 256
    link_bytes_per_second: PositiveFloat = 1e9


class Detection(Section):
    """When a worker counts as gone although its process lives; all in seconds but ``stuck_steps``.

    Workers give a sign of life every ``beat_seconds``. One that has not for ``silence_seconds`` is given up
    (later, where signs have been irregular), as is one that has been inside one call for ``stuck_steps``
    times the median step and at least ``stuck_seconds``. A worker that has had no controller for
    ``orphan_seconds`` ends by itself.
    """

    beat_seconds: PositiveFloat = 0.2
    silence_seconds: PositiveFloat = 1.0
    stuck_seconds: PositiveFloat = 5.0
    stuck_steps: PositiveFloat = 5.0
    orphan_seconds: PositiveFloat = 30.0


class Fault(Section):
    """Worker ``worker`` kills itself at point ``at`` of step ``step`` (first try).

    ``micro_batch`` narrows "forward" and "backward" to one micro-batch.
    """

    step: PositiveInt
    worker: Natural
    at: Literal["forward", "backward", "reduce", "exchange", "optimizer", "gather", "backup", "checkpoint"]
    signal: Literal["SIGKILL"] = "SIGKILL"
    micro_batch: Natural | None = None


class Recipe(Section):
    """A whole recipe. Raises pydantic's ValidationError; ``load_recipe`` puts it in one sentence."""

    run: Run
    model: Model
    data: Data = Data()
    optimizer: Optimizer
    parallel: Parallel
    paths: Paths | None = None
    engine: Engine = Engine()
    precision: Precision = Precision()
    reduction: Literal["exact", "fast"] = "exact"
    salvage: bool = True
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    fabric: Fabric = Fabric()
    detection: Detection = Detection()
    faults: Annotated[tuple[Fault, ...], Field(strict=False)] = ()

    @property
    def searches(self) -> bool:
        """Whether plans choose their strategy by search."""
        parallel = self.parallel
        return AUTO in (parallel.schedule, parallel.sharding, parallel.sequence, self.precision.recompute)

    @property
    def decay_steps(self) -> int:
        """The step at which the learning rate has come down to its minimum."""
        return self.optimizer.decay_steps or self.run.steps

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        parallel, optimizer = self.parallel, self.optimizer
        if parallel.min_workers > parallel.workers:
            raise ValueError(
                f"parallel.min_workers ({parallel.min_workers}) is larger than parallel.workers "
                f"({parallel.workers}): lower min_workers or raise workers."
            )
        if parallel.max_workers is not None and parallel.max_workers < parallel.workers:
            raise ValueError(
                f"parallel.max_workers ({parallel.max_workers}) is smaller than parallel.workers "
                f"({parallel.workers}): raise max_workers, or lower workers to begin with fewer."
            )
        if parallel.spares and parallel.max_workers is None:
            raise ValueError(
                f"parallel.spares ({parallel.spares}) has no meaning without parallel.max_workers: set "
                "max_workers to the number of workers that train, or remove spares."
            )
        check_choices(
            parallel.schedule,
            parallel.chunks,
            self.precision.recompute,
            has_memory=parallel.memory is not None,
            sequence=parallel.sequence,
            sharding=parallel.sharding,
            engine=self.engine.name,
        )
        offloads, teams = parallel.offload is not None, (parallel.sequence, parallel.slices)
        skips = (parallel.schedule, self.paths, parallel.slices, self.engine.name)
        check_paths(*skips, self.precision.recompute, parallel.sharding)
        check_sharding(parallel.sharding, offloads, self.reduction, self.engine.name)
        check_sequence(*teams, parallel.sharding, self.engine.name, offloads=offloads)
        if self.detection.silence_seconds < 5 * self.detection.beat_seconds:
            raise ValueError(
                f"detection.silence_seconds ({self.detection.silence_seconds}) is shorter than five times "
                f"detection.beat_seconds ({self.detection.beat_seconds}): raise it, or lower beat_seconds."
            )
        if isinstance(parallel.stages, int) and parallel.stages > parallel.workers:
            raise ValueError(
                f"parallel.stages ({parallel.stages}) is larger than parallel.workers ({parallel.workers}): "
                "every stage needs a worker, so lower stages or raise workers."
            )
        if optimizer.warmup_steps >= self.decay_steps:
            end = "optimizer.decay_steps" if optimizer.decay_steps else "run.steps"
            raise ValueError(
                f"optimizer.warmup_steps ({optimizer.warmup_steps}) is not below {end} ({self.decay_steps}): "
                f"lower warmup_steps or raise {end.rpartition('.')[2]}."
            )
        taken = sorted({"micro_batch_size", "micro_batches", "seed"} & self.data.arguments.keys())
        if taken:
            right = "run.seed" if taken[0] == "seed" else f"parallel.{taken[0]}"
            raise ValueError(f"data.arguments.{taken[0]} is set by {right}: remove it from [data.arguments].")
        for index, fault in enumerate(self.faults):
            self._check_fault(f"faults.{index}", fault)
        return self

    def _check_fault(self, key: str, fault: Fault) -> None:
        if fault.worker >= self.parallel.workers:
            raise ValueError(
                f"{key}.worker ({fault.worker}) does not exist: parallel.workers is {self.parallel.workers} "
                f"and workers count from 0, so name one from 0 to {self.parallel.workers - 1}."
            )
        if fault.step > self.run.steps:
            raise ValueError(
                f"{key}.step ({fault.step}) is never reached: run.steps is {self.run.steps}, so name a "
                f"step from 1 to {self.run.steps}."
            )
        if fault.micro_batch is None:
            return
        if fault.at not in ("forward", "backward"):
            raise ValueError(
                f"{key}.micro_batch has no meaning at {fault.at!r}: remove it, or set {key}.at to "
                '"forward" or "backward".'
            )
        if fault.micro_batch >= self.parallel.micro_batches:
            raise ValueError(
                f"{key}.micro_batch ({fault.micro_batch}) does not exist: parallel.micro_batches is "
                f"{self.parallel.micro_batches}, so name one from 0 to {self.parallel.micro_batches - 1}."
            )

    def to_toml(self) -> str:
        """The recipe with every default filled in; reads back as an equal recipe."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def digest(self) -> str:
        """64 hex digits that change with any value of the recipe, whatever the order of its keys."""
        return _sha256(self.model_dump())

    def numerics_digest(self) -> str:
        """As ``digest``, of ``numerics``: a checkpoint of one recipe may be resumed by another whose numerics
        digest is the same."""
        return _sha256(self.numerics())

    def numerics(self) -> dict[str, Any]:
        """What decides a run's bits, by the recipe's keys: equal for any number of workers or stages."""
        parallel = ("micro_batches", "micro_batch_size", "threads")
        return {
            "run": {"seed": self.run.seed},
            "model": self.model.model_dump(),
            "data": {"build": self.data.build, "arguments": self.data.arguments},
            "optimizer": {**self.optimizer.model_dump(), "decay_steps": self.decay_steps},
            "parallel": {
                **{name: getattr(self.parallel, name) for name in parallel},
                **({"sequence_slices": self.parallel.slices} if self.parallel.slices > 1 else {}),
            },
            "precision": {"autocast": self.precision.autocast},
            "reduction": self.reduction,
            **({"paths": self.paths.numerics()} if self.paths is not None else {}),
            **({"engine": {"settings": self.engine.settings}} if self.engine.name != "reknit" else {}),
        }


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks the recipe at ``path``, with ``overrides`` such as ``parallel.workers=6``.

    An override's value is TOML; a bare word is taken as text (``reduction=fast``), a number picks
    an element of a list (``faults.0.step=5``). Raises RecipeError: one sentence.
    """
    recipe = read_model(Path(path), overrides, Recipe)
    if recipe.engine.name == "deepspeed":
        from jobs.deepspeed_config import with_settings  # which needs the recipe's own types

        recipe = with_settings(recipe, Path(path))
    return recipe
