"""What a foreign engine (DeepSpeed) computes and owns, worked out before any engine is there. Pure.

Every worker holds the whole model and is one data-parallel rank: the plan's members in ascending order.
DeepSpeed divides optimizer state (stages 1 and 2) and parameters (stage 3) by its own rule (Rajbhandari et
al., "ZeRO", SC'20); the plan's shards are cut by the same rule, so that what a worker owns and backs up is
what its engine has in memory, and nothing has to be redistributed after a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.layout import Layout
from runtime.plan import Member, Plan, Shard, Stage, WorkerId
from runtime.signals import PlanChooser
from runtime.speeds import Speeds
from strategies.sharding import backup_ring, shard_blocks

FLAT_ALIGNMENT = 2
"""DeepSpeed pads the flat vector of a parameter group to a multiple of this times the number of ranks."""

Cut = tuple[int, int, int]
"""(start, stop, rank) in elements of a block."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """A DeepSpeed engine as a job names it.

    ``config`` is the user's DeepSpeed configuration as JSON, without batch sizes; ``stage`` its ZeRO stage.
    ``own_optimizer``: the configuration names the optimizer, else it is the job's AdamW; ``own_rate``: its
    learning rate follows from the configuration, else from the job. ``alignment``: elements to a multiple of
    which every parameter is padded in a flat vector (``zero_optimization.parameter_alignment``).
    """

    config: str
    stage: int
    own_optimizer: bool
    own_rate: bool
    alignment: int = 1


@dataclass(frozen=True, slots=True)
class Turn:
    """One micro-batch of one rank. ``weight`` is what its mean loss is multiplied by; 0.0: it only keeps the
    collectives of the other ranks company."""

    micro_batch: int
    weight: float


def rounds(micro_batches: int, ranks: int) -> int:
    """How many micro-batches every rank goes through in a step: DeepSpeed's gradient accumulation steps."""
    return -(-micro_batches // ranks)


def turns(mine: Sequence[int], micro_batches: int, ranks: int) -> tuple[Turn, ...]:
    """A rank's part of a step in which all ranks must make the same number of passes.

    DeepSpeed divides a loss by the accumulation steps and averages gradients over the ranks, so each loss is
    multiplied by both and divided by the number of micro-batches: the sum over all ranks is the mean over the
    global batch, whoever is there. A rank with fewer micro-batches repeats its last one (the step's first if
    it has none) with weight 0.
    """
    passes = rounds(micro_batches, ranks)
    assert len(mine) <= passes, f"{len(mine)} micro-batches do not fit into {passes} passes"
    filler = mine[-1] if mine else 0
    weight = passes * ranks / micro_batches
    whole = [Turn(micro_batch, weight) for micro_batch in mine]
    return (*whole, *(Turn(filler, 0.0) for _ in range(passes - len(mine))))


def parameter_groups(layout: Layout, own_optimizer: bool) -> tuple[tuple[int, ...], ...]:
    """Tensor indices by the optimizer's parameter group, none empty.

    The configuration's optimizer gets all tensors in order, as ``model.parameters()`` would give them; the
    job's AdamW has those that decay and those that do not.
    """
    if own_optimizer:
        return (tuple(tensor.index for tensor in layout.tensors),)
    decays = tuple(tensor.index for tensor in layout.tensors if tensor.decays)
    others = tuple(tensor.index for tensor in layout.tensors if not tensor.decays)
    return tuple(group for group in (decays, others) if group)


def partition(layout: Layout, settings: EngineSettings, ranks: int) -> list[list[Cut]]:
    """Which rank's engine holds the float32 state of which elements, by block; ZeRO stages 1 to 3.

    Cuts are ascending, cover every block once and differ in rank from their neighbours. Padding between
    tensors belongs to whoever has the end of the tensor before it.
    """
    assert settings.stage > 0, "without ZeRO every rank holds everything"
    ends = _flat_ends(layout, settings, ranks) if settings.stage < 3 else _own_ends(layout, ranks)
    blocks: list[list[Cut]] = []
    for block in layout.blocks:
        cuts: list[Cut] = []
        for place, tensor in enumerate(block.tensors):
            following = block.tensors[place + 1].offset if place + 1 < len(block.tensors) else block.size
            pieces = ends[tensor.index]
            for index, (end, rank) in enumerate(pieces):
                stop = following if index == len(pieces) - 1 else tensor.offset + end
                if cuts and cuts[-1][2] == rank:
                    cuts[-1] = (cuts[-1][0], stop, rank)
                else:
                    cuts.append((cuts[-1][1] if cuts else 0, stop, rank))
        blocks.append(cuts)
    return blocks


Ends = dict[int, list[tuple[int, int]]]
"""By tensor index: (first element that is no longer the rank's, rank), ascending."""


def _flat_ends(layout: Layout, settings: EngineSettings, ranks: int) -> Ends:
    """Stages 1 and 2: each parameter group is one flat vector, cut into equal parts."""
    ends: Ends = {}
    for group in parameter_groups(layout, settings.own_optimizer):
        offsets, reached = {}, 0
        for index in group:
            reached = -(-reached // settings.alignment) * settings.alignment
            offsets[index] = reached
            reached += layout.tensors[index].size
        unit = FLAT_ALIGNMENT * ranks
        part = -(-reached // unit) * unit // ranks
        for index, offset in offsets.items():
            size = layout.tensors[index].size
            last = (offset + size - 1) // part
            ends[index] = [
                (min(size, (rank + 1) * part - offset), rank) for rank in range(offset // part, last + 1)
            ]
    return ends


def _own_ends(layout: Layout, ranks: int) -> Ends:
    """Stage 3: each parameter is cut into equal parts, the last one padded."""
    ends: Ends = {}
    for tensor in layout.tensors:
        part = -(-tensor.size // ranks)
        ends[tensor.index] = [
            (min(tensor.size, (rank + 1) * part), rank) for rank in range(-(-tensor.size // part))
        ]
    return ends


def engine_plan_chooser(layout: Layout, micro_batches: int, settings: EngineSettings) -> PlanChooser:
    """One stage of all members, no more than there are micro-batches; those at work keep theirs."""

    def choose(generation: int, members: Sequence[Member], speeds: Speeds, previous: Plan | None) -> Plan:
        at_work = set(previous.workers) if previous is not None else set()
        first = sorted(members, key=lambda member: (member.worker not in at_work, member.worker))
        chosen = sorted(first[:micro_batches], key=lambda member: member.worker)
        workers = tuple(member.worker for member in chosen)
        stages = (Stage(0, layout.layers, workers),)
        dealt = tuple(workers[micro_batch % len(workers)] for micro_batch in range(micro_batches))
        if settings.stage == 0:
            return Plan(generation, stages, (dealt,), shard_blocks(layout, stages, chosen))
        backups = _backups(chosen)
        shards = tuple(
            Shard(block, start, stop, workers[rank], backups[workers[rank]])
            for block, cuts in enumerate(partition(layout, settings, len(workers)))
            for start, stop, rank in cuts
        )
        return Plan(generation, stages, (dealt,), shards)

    return choose


def _backups(members: Sequence[Member]) -> dict[WorkerId, WorkerId | None]:
    """Everybody's backup: a worker in another failure domain wherever there is one."""
    domains = {member.worker: member.domain for member in members}
    workers = sorted(domains)
    if len(workers) == 1:
        return {workers[0]: None}
    if len(set(domains.values())) > 1:
        # one domain may have more than half of them, which no ring can spread
        ring = backup_ring(workers, workers, domains) or {}
        spread = {w: next((o for o in _after(workers, w) if domains[o] != domains[w]), None) for w in workers}
        return {w: ring[w] if ring and domains[ring[w]] != domains[w] else spread[w] for w in workers}
    return {worker: next(iter(_after(workers, worker))) for worker in workers}


def _after(workers: Sequence[WorkerId], worker: WorkerId) -> list[WorkerId]:
    place = workers.index(worker)
    return [*workers[place + 1 :], *workers[:place]]
