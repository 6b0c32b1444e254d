"""What goes by what order and tag when plans change: for the workers that move it, real and simulated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from runtime.fabric.interface import Tag
from runtime.plan import Shard, WorkerId
from runtime.resharding import Transfer


def parameters_of(worker: WorkerId, transfers: Sequence[Transfer]) -> list[Transfer]:
    """The parameters that ``worker`` sends: first to who needs the least of them, who can then go on the
    soonest."""
    parameters = [transfer for transfer in transfers if transfer.what == "parameters"]
    needed = Counter[WorkerId]()
    for transfer in parameters:
        needed[transfer.target] += transfer.bytes
    mine = [transfer for transfer in parameters if transfer.source == worker]
    return sorted(mine, key=lambda transfer: needed[transfer.target])


def tag_of(transfer: Transfer, generation: int, version: int) -> Tag:
    """Under which ``transfer`` travels."""
    what = "move parameters" if transfer.what == "parameters" else "move state"
    return Tag(generation, version, 0, what, (transfer.block, transfer.start, transfer.stop))


def meet(transfer: Transfer, shard: Shard) -> bool:
    """Whether they have elements in common."""
    return transfer.block == shard.block and transfer.start < shard.stop and shard.start < transfer.stop
