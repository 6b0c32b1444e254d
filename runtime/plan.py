"""The plan: who holds which layers, owns and backs up which shards, computes which micro-batch.

Plans are immutable values. A change of membership makes a new plan with a higher generation; no
plan is ever edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import Any

from runtime.grouping import grouped
from runtime.layout import Layout

WorkerId = int

CONTROLLER: WorkerId = -1
"""The controller's address on the fabric."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers ``first`` to ``stop - 1``, held by every worker of the stage group ``workers``."""

    first: int
    stop: int
    workers: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """Elements ``start`` to ``stop - 1`` of a block: parameters and optimizer state.

    ``backup`` is None only while there is a single worker.
    """

    block: int
    start: int
    stop: int
    owner: WorkerId
    backup: WorkerId | None

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Strategy:
    """How a plan's work is done, as far as that never changes the result's bits.

    ``schedule`` and ``sharding`` are names of their registries; a stage group holds ``chunks`` stages, and
    ``sequence`` of its workers compute a micro-batch together. ``recompute``: the layers, ascending, whose
    activations are computed again in backward. ``offload``: parameters are in host memory, and of (window,
    move) layers on the device.
    """

    schedule: str
    chunks: int = 1
    sharding: str = "zero1"
    sequence: int = 1
    recompute: tuple[int, ...] = ()
    offload: tuple[int, int] | None = None


class Keeping(Enum):
    """What a worker keeps from step to step of the blocks that it holds, beside the shards that it owns and
    backs up."""

    NOTHING = "nothing"
    """Parameters come from their owners each time that a layer needs them (ZeRO-3)."""
    PARAMETERS = "parameters"
    """All of the parameters (ZeRO-1, ZeRO-2)."""
    STATE = "state"
    """All of the parameters, and every shard's state as well (DDP)."""


@dataclass(frozen=True)
class Plan:
    """Work divided among the members of one generation.

    ``assignment[k][m]`` is the worker that computes micro-batch m at stage k. ``shards`` lists
    every block's shards in order of (block, start); together they cover each block once. A stage group
    may hold several stages: then these have the same workers, and each of them is a chunk of theirs.

    ``paths[m]``: the stages that micro-batch m passes, in order, from 0 to the last; none given: all of
    them, in order. Where a micro-batch does not pass a stage its assignment there means nothing in training.

    ``teams``: workers of one stage group that compute micro-batches together. Those of a team are assigned to
    its first member, which leads it. Whoever is in none of them computes alone.

    ``strategy``: how it is done, where that was searched for; None: as the job says.
    """

    generation: int
    stages: tuple[Stage, ...]
    assignment: tuple[tuple[WorkerId, ...], ...]
    shards: tuple[Shard, ...]
    keeping: Keeping = Keeping.PARAMETERS
    teams: tuple[tuple[WorkerId, ...], ...] = ()
    paths: tuple[tuple[int, ...], ...] = ()
    strategy: Strategy | None = None

    @cached_property
    def workers(self) -> tuple[WorkerId, ...]:
        """Every member, ascending."""
        return tuple(sorted({worker for stage in self.stages for worker in stage.workers}))

    @cached_property
    def groups(self) -> tuple[tuple[WorkerId, ...], ...]:
        """The workers of every stage group, in the order of their first stages."""
        return tuple(dict.fromkeys(stage.workers for stage in self.stages))

    @property
    def micro_batches(self) -> int:
        return len(self.assignment[0])

    @cached_property
    def _next(self) -> tuple[Mapping[int, int], ...]:
        return tuple(dict(pairwise(path)) for path in self.paths)

    @cached_property
    def _last(self) -> tuple[Mapping[int, int], ...]:
        return tuple(dict(pairwise(reversed(path))) for path in self.paths)

    def passes(self, micro_batch: int, stage: int) -> bool:
        """Whether ``stage`` is on the path of ``micro_batch``."""
        return not self.paths or stage in self.paths[micro_batch]

    def after(self, micro_batch: int, stage: int) -> int | None:
        """The stage that ``micro_batch`` passes next; None after the last one."""
        if self.paths:
            return self._next[micro_batch].get(stage)
        return stage + 1 if stage + 1 < len(self.stages) else None

    def before(self, micro_batch: int, stage: int) -> int | None:
        """The stage from which ``micro_batch`` comes; None at the first one."""
        if self.paths:
            return self._last[micro_batch].get(stage)
        return stage - 1 if stage else None

    @cached_property
    def _stages_of(self) -> dict[WorkerId, tuple[int, ...]]:
        held: dict[WorkerId, tuple[int, ...]] = {}
        for k, stage in enumerate(self.stages):
            for worker in stage.workers:
                held[worker] = (*held.get(worker, ()), k)
        return held

    def stages_of(self, worker: WorkerId) -> tuple[int, ...]:
        """The indices, ascending, of the stages that ``worker`` holds. Raises KeyError for a non-member."""
        return self._stages_of[worker]

    def stage_of(self, worker: WorkerId) -> int:
        """The index of the first stage that ``worker`` holds. Raises KeyError for a non-member."""
        return self._stages_of[worker][0]

    @cached_property
    def _stage_of_layer(self) -> tuple[int, ...]:
        return tuple(k for k, stage in enumerate(self.stages) for _ in range(stage.first, stage.stop))

    @cached_property
    def _team_of(self) -> dict[WorkerId, tuple[WorkerId, ...]]:
        return {worker: team for team in self.teams for worker in team}

    def team_of(self, worker: WorkerId) -> tuple[WorkerId, ...]:
        """Those with whom ``worker`` computes, itself among them; the first one leads."""
        return self._team_of.get(worker, (worker,))

    def teams_at(self, stage: int) -> tuple[tuple[WorkerId, ...], ...]:
        """All teams of a stage group, those of one worker among them."""
        return tuple(dict.fromkeys(self.team_of(worker) for worker in self.stages[stage].workers))

    def holders(self, layers: tuple[int, ...]) -> tuple[WorkerId, ...]:
        """The workers, ascending, that hold any of ``layers`` (a block's ``layers``, say)."""
        stages = {self._stage_of_layer[layer] for layer in layers}
        return tuple(sorted({worker for k in stages for worker in self.stages[k].workers}))

    @cached_property
    def reporters(self) -> tuple[WorkerId, ...]:
        """The workers that tell the controller of every step: the first, and one in another failure domain
        if there is any, where the first one's first backup is. A silent loss of one leaves no gap in the log.
        """
        first = self.workers[0]
        backups = (shard.backup for shard in self.shards if shard.owner == first)
        other = next((backup for backup in backups if backup is not None), None)
        return (first,) if other is None else (first, other)

    @cached_property
    def _shards_of(self) -> dict[int, list[Shard]]:
        return grouped(self.shards, lambda shard: shard.block)

    @cached_property
    def _owned_by(self) -> dict[WorkerId, list[Shard]]:
        return grouped(self.shards, lambda shard: shard.owner)

    @cached_property
    def _backed_up_by(self) -> dict[WorkerId | None, list[Shard]]:
        return grouped(self.shards, lambda shard: shard.backup)

    @cached_property
    def _micro_batches_of(self) -> dict[tuple[WorkerId, int], list[int]]:
        dealt: dict[tuple[WorkerId, int], list[int]] = {}
        for k, row in enumerate(self.assignment):
            for micro_batch, worker in enumerate(row):
                if self.passes(micro_batch, k):
                    dealt.setdefault((worker, k), []).append(micro_batch)
        return dealt

    def shards_of(self, block: int) -> Iterator[Shard]:
        return iter(self._shards_of.get(block, ()))

    def owned_by(self, worker: WorkerId) -> Iterator[Shard]:
        return iter(self._owned_by.get(worker, ()))

    def backed_up_by(self, worker: WorkerId) -> Iterator[Shard]:
        return iter(self._backed_up_by.get(worker, ()))

    def kept_by(self, worker: WorkerId, layout: Layout) -> tuple[Shard, ...]:
        """The shards whose state ``worker`` keeps, in order of (block, start)."""
        kept = {*self.owned_by(worker), *self.backed_up_by(worker)}
        if self.keeping is Keeping.STATE:
            held = (block.index for block in layout.blocks if worker in self.holders(block.layers))
            kept.update(shard for block in held for shard in self.shards_of(block))
        return tuple(sorted(kept, key=lambda shard: (shard.block, shard.start)))

    def micro_batches_of(self, worker: WorkerId, stage: int | None = None) -> tuple[int, ...]:
        """The micro-batches, ascending, that ``worker`` computes at ``stage`` (None: the first one of its
        own). Raises KeyError for a non-member."""
        k = self.stage_of(worker) if stage is None else stage
        return tuple(self._micro_batches_of.get((worker, k), ()))

    def __reduce__(self) -> tuple[Any, ...]:
        # what is cached is larger than the plan and quickly found again: it does not travel
        state = (self.generation, self.stages, self.assignment, self.shards)
        return Plan, (*state, self.keeping, self.teams, self.paths, self.strategy)


@dataclass(frozen=True, slots=True)
class Member:
    """A worker as the planner sees it.

    ``domain`` names its failure domain; ``speed`` is relative to the others (1.0 = typical).
    """

    worker: WorkerId
    domain: str
    speed: float = 1.0
