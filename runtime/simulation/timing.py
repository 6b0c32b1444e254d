"""What a fleet's workers hold, and how long they take: closed formulas in place of messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from runtime.layout import Layout
from runtime.plan import Plan, WorkerId
from runtime.resharding import Transfer
from runtime.simulation.fleet_report import FleetSettings
from runtime.snapshots import Piece

STATE_BYTES_PER_ELEMENT = 12
"""A parameter and Adam's two moments, as float32."""


def kept_by(plan: Plan) -> dict[WorkerId, list[Piece]]:
    """The pieces of state that everybody owns or backs up."""
    kept: dict[WorkerId, list[Piece]] = {}
    for shard in plan.shards:
        for keeper in (shard.owner, shard.backup):
            if keeper is not None:
                kept.setdefault(keeper, []).append((shard.block, shard.start, shard.stop))
    return kept


def held_blocks(layout: Layout, plan: Plan) -> Mapping[WorkerId, Sequence[int]]:
    """The blocks of the layers that everybody holds."""
    held: dict[WorkerId, Sequence[int]] = {}
    for stage in plan.stages:
        blocks = [block.index for block in layout.blocks_of(stage.first, stage.stop)]
        held.update(dict.fromkeys(stage.workers, blocks))
    return held


def step_seconds(plan: Plan, settings: FleetSettings) -> float:
    """The busiest worker's micro-batches, and the pipeline's ramp."""
    times = [3 * settings.layer_seconds * (stage.stop - stage.first) for stage in plan.stages]
    busiest = [max(Counter(row).values()) for row in plan.assignment]
    steady = max(taken * count for taken, count in zip(times, busiest, strict=True))
    return steady + sum(times) - max(times)


def move_seconds(transfers: Iterable[Transfer], settings: FleetSettings) -> float:
    """Until the busiest link has carried what its worker sends and gets."""
    moving: Counter[WorkerId] = Counter()
    for transfer in transfers:
        moving[transfer.source] += transfer.bytes
        moving[transfer.target] += transfer.bytes
    return max(moving.values(), default=0) / settings.link_bytes_per_second


def load_seconds(kept: Iterable[Collection[Piece]], settings: FleetSettings) -> float:
    """Until whoever keeps the most has read it from durable storage."""
    most = max((sum(stop - start for _, start, stop in pieces) for pieces in kept), default=0)
    return most * STATE_BYTES_PER_ELEMENT / settings.storage_bytes_per_second
