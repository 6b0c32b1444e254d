"""DDP: everybody holds the whole optimizer state of its layers and updates all of it.

Gradients are summed at the owners of shards and their means go to all holders, which is the all-reduce of
Li et al., "PyTorch Distributed" (VLDB'20), in its two halves; no parameters follow the update. So as many
elements are sent as under ZeRO-1, for more memory. Replicas in the stage group take the place of backups: a
copy is only sent where a shard's backup does not hold its block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.fabric.interface import Endpoint, Tag
from runtime.layout import Layout
from runtime.plan import Plan, WorkerId
from runtime.snapshots import Piece
from strategies.zero import ZeroRounds, piece_of


class ReplicaRounds(ZeroRounds):
    """The rounds of DDP."""

    def __init__(self, endpoint: Endpoint, plan: Plan, layout: Layout, worker: WorkerId) -> None:
        super().__init__(endpoint, plan, layout, worker)
        holders = [set(plan.holders(block.layers)) for block in layout.blocks]
        for copies in (self._to_backup, self._backed_up):
            for peer, shards in list(copies.items()):
                copies[peer] = [shard for shard in shards if shard.backup not in holders[shard.block]]
                if not copies[peer]:
                    del copies[peer]

    def spread(self, tag: Tag, gradients: dict[Piece, Tensor]) -> dict[Piece, Tensor]:
        for holder, shards in self._to_holder.items():
            self._endpoint.send(holder, tag, [gradients[piece_of(shard)] for shard in shards])
        everybodys = dict(gradients)
        for _ in self._from_owner:
            message = self._endpoint.receive_any([tag])
            for shard, part in zip(self._from_owner[message.sender], message.tensors, strict=True):
                everybodys[piece_of(shard)] = part
        return everybodys

    @torch.no_grad()
    def gather(self, tag: Tag, working: dict[int, Tensor], new_states: dict[Piece, Tensor]) -> None:
        """Takes over what this worker itself has updated: nobody sends any parameters."""
        for (block, start, stop), state_3N in new_states.items():
            working[block][start:stop] = state_3N[0]
