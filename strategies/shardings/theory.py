"""Bytes that a sharding keeps and sends, worked out from the plan: what the ledgers must show.

With P parameters in a stage, g workers in its group and m micro-batches a worker, in bytes a worker:

========  ==========================  ==============  ==========================  ==================
sharding  parameters                  sums            shards, of the last two     sent a step, times
                                                      steps, and as many backups  (g - 1) / g
========  ==========================  ==============  ==========================  ==================
ddp       4 P                         8 P             24 P, backups only at need  8 P + 4 P
zero1     4 P                         8 P             24 P / g                    8 P + 4 P
zero2     4 P                         8 P / g         24 P / g                    4 m P + 4 P
zero3     4 x two layers of P         8 P / g         24 P / g                    4 m P + 8 m P
========  ==========================  ==============  ==========================  ==================

For m = 1 the elements sent are 2 P for the first three and 3 P for ZeRO-3 (Rajbhandari et al., "ZeRO", SC'20,
sec. 7). Exact sums take 8 bytes; one micro-batch's rounded gradient takes 4, since it fits a float32.
Copies for the backups are counted apart.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from runtime.layout import Layout
from runtime.plan import Keeping, Plan, WorkerId
from strategies.options import Offload
from strategies.shardings.registry import SHARDINGS

PARAMETER, ROUNDED, SUM, STATE, VERSIONS = 4, 4, 8, 12, 2
"""Bytes of a parameter, of a micro-batch's rounded gradient, of an exact sum and of a shard's state, each
per element, and how many steps' states are kept."""


@dataclass(frozen=True, slots=True)
class BlockPart:
    """One worker's part in one block, in elements (padding included); fractions where shares are averages.

    ``uses`` counts this worker's forwards through layers that use the block, in a step, ``others_uses`` those
    of its other ``holders``. Of ``owned``, ``backed_by_holders`` have their backup at another holder, and
    ``backed_elsewhere`` at somebody who does not hold the block.
    """

    size: float
    held: bool
    holders: int
    owned: float
    backed_by_holders: float
    backed_elsewhere: float
    backed_up: float
    uses: float
    others_uses: float


@dataclass(frozen=True)
class Part:
    """One worker's part in a model. ``layers``: which of ``blocks`` (by place) each held layer uses, by stage
    and in order."""

    blocks: tuple[BlockPart, ...]
    layers: tuple[tuple[frozenset[int], ...], ...]


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes in a worker's memory. ``parameters`` are those with which layers compute, at their most; with
    offload these and nothing else are on the device, beside ``host_parameters``."""

    parameters: float
    sums: float
    shards: float
    backups: float
    host_parameters: float = 0.0

    @property
    def total(self) -> float:
        return self.parameters + self.sums + self.shards + self.backups + self.host_parameters

    @property
    def device(self) -> float:
        """Of an accelerator: shards and backups are in host memory always."""
        return self.parameters if self.host_parameters else self.parameters + self.sums


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes that a worker sends in a step: gradients to owners, what follows the update (parameters, or
    gradients under DDP), parameters that others compute with under ZeRO-3, copies to backups."""

    reduce: float
    gather: float
    fetch: float
    backup: float

    @property
    def total(self) -> float:
        return self.reduce + self.gather + self.fetch + self.backup


def part_of(layout: Layout, plan: Plan, worker: WorkerId) -> Part:
    """Exactly what ``plan`` gives ``worker``, of every block of the model."""
    uses_layer = _uses_of_layers(plan)
    blocks = []
    for block in layout.blocks:
        holders = plan.holders(block.layers)
        shards = list(plan.shards_of(block.index))
        owned = [shard for shard in shards if shard.owner == worker]
        uses = {w: sum(uses_layer[layer].get(w, 0) for layer in block.layers) for w in holders}
        blocks.append(
            BlockPart(
                size=block.size,
                held=worker in holders,
                holders=len(holders),
                owned=sum(shard.size for shard in owned),
                backed_by_holders=sum(shard.size for shard in owned if shard.backup in holders),
                backed_elsewhere=sum(
                    shard.size for shard in owned if shard.backup is not None and shard.backup not in holders
                ),
                backed_up=sum(shard.size for shard in shards if shard.backup == worker),
                uses=uses.get(worker, 0),
                others_uses=sum(count for w, count in uses.items() if w != worker),
            )
        )
    stages = (plan.stages[k] for k in plan.stages_of(worker))
    layers = tuple(
        tuple(
            frozenset(b.index for b in layout.blocks_of(layer, layer + 1)) for layer in range(s.first, s.stop)
        )
        for s in stages
    )
    return Part(tuple(blocks), layers)


def _uses_of_layers(plan: Plan) -> list[dict[WorkerId, int]]:
    """How many micro-batches every worker computes, by layer."""
    found: list[dict[WorkerId, int]] = []
    for k, stage in enumerate(plan.stages):
        dealt = {worker: len(plan.micro_batches_of(worker, k)) for worker in stage.workers}
        found += [dealt] * (stage.stop - stage.first)
    return found


def resident_bytes(sharding: str, part: Part, offload: Offload | None = None) -> Resident:
    """Of a worker that has made at least two steps, activations and messages under way left out."""
    entry = SHARDINGS[sharding]
    replicated = entry.keeping is Keeping.STATE
    held = [block for block in part.blocks if block.held]
    whole, owned = sum(block.size for block in held), sum(block.owned for block in held)
    backed_up = sum(block.backed_up for block in part.blocks if not (replicated and block.held))
    kept = whole if replicated else owned
    parameters, host = PARAMETER * whole, 0.0
    if not entry.keeps.parameters:
        parameters = PARAMETER * widest(part, 2)
    elif offload is not None:
        parameters, host = PARAMETER * widest_in_chunks(part, offload), PARAMETER * whole
    return Resident(
        parameters=parameters,
        sums=SUM * (whole if entry.keeps.sums else owned),
        shards=VERSIONS * STATE * kept,
        backups=VERSIONS * STATE * backed_up,
        host_parameters=host,
    )


def sent_bytes(sharding: str, part: Part, *, split_backward: bool = False) -> Sent:
    """In a step without held-out passes or repetition; ``split_backward``: the schedule computes weights'
    gradients apart, for which ZeRO-3 fetches parameters a third time."""
    entry = SHARDINGS[sharding]
    reduce = gather = fetch = backup = 0.0
    for block in part.blocks:
        missing = block.size - block.owned if block.held else 0.0
        spread = PARAMETER * block.owned * (block.holders - 1)
        if entry.keeps.sums:
            reduce += SUM * missing
        else:
            reduce += ROUNDED * missing * block.uses
        if not entry.keeps.parameters:
            fetch += PARAMETER * block.owned * block.others_uses * (3 if split_backward else 2)
            backup += STATE * (block.backed_by_holders + block.backed_elsewhere)
        else:
            gather += spread
            replicated = entry.keeping is Keeping.STATE
            at_holders = 0.0 if replicated else (STATE - PARAMETER) * block.backed_by_holders
            backup += at_holders + STATE * block.backed_elsewhere
    return Sent(reduce, gather, fetch, backup)


def moved_bytes(part: Part, offload: Offload, micro_batches: int) -> float:
    """What comes from the host into a device that computes ``micro_batches`` one after the other, each
    forward and then backward, in a step: the window is empty as the step begins, and at every turn of
    direction as much of it as fits is there already. For one stage without tied blocks."""
    (layers,) = part.layers
    sizes = [sum(part.blocks[b].size for b in layer) for layer in layers]
    chunks = [sum(sizes[i : i + offload.move]) for i in range(0, len(sizes), offload.move)]
    kept = min(offload.window // offload.move, len(chunks))
    passing = sum(chunks[kept:]) + sum(chunks[: len(chunks) - kept])
    return PARAMETER * (sum(chunks[:kept]) + micro_batches * passing)


def widest(part: Part, layers: int) -> float:
    """The most elements in any ``layers`` consecutive layers of one stage."""
    return max(
        (
            _elements(part, stage[first : first + layers])
            for stage in part.layers
            for first in range(max(len(stage) - layers, 0) + 1)
        ),
        default=0.0,
    )


def widest_in_chunks(part: Part, offload: Offload) -> float:
    """The most elements of a stage in a resident window and the move that goes before it."""
    together = offload.window // offload.move + 1
    widest_of = 0.0
    for stage in part.layers:
        chunks = [frozenset().union(*stage[i : i + offload.move]) for i in range(0, len(stage), offload.move)]
        for first in range(max(len(chunks) - together, 0) + 1):
            widest_of = max(widest_of, _elements(part, chunks[first : first + together]))
    return widest_of


def _elements(part: Part, layers: Collection[frozenset[int]]) -> float:
    return sum(part.blocks[block].size for block in frozenset().union(*layers))
