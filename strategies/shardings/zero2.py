"""ZeRO-2: nobody keeps sums of more than the shards that it owns.

As soon as a layer's backward is done its gradients go to the owners of its shards, micro-batch by micro-batch
(Rajbhandari et al., "ZeRO", SC'20, sec. 5.2, whose buckets are layers here), as integers that fit a float32;
no more than one layer's are in memory at once. Owners add up what comes while they wait and between two
layers. Exact sums do not depend on the order. A lost worker's contributions cannot be told from others' any
more: an interrupted step is done again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.exact import contribution
from runtime.fabric.interface import Message, Tag
from runtime.plan import Shard, WorkerId
from runtime.snapshots import Piece, ShardStore
from strategies.stage import Gradients, StageModel
from strategies.zero import ZeroRounds, piece_of


class GradientRounds(ZeroRounds):
    """The rounds of ZeRO-2. Needs exact sums."""

    def join(self, stage: StageModel, store: ShardStore) -> None:
        super().join(stage, store)
        stage.collect = self._collect
        self._stage = stage
        self._sums: dict[Piece, Tensor] = {}
        self._channel = Tag(self.plan.generation, 0, 0, "contribution")
        self._left = 0
        self._shards_of: dict[int, dict[WorkerId, list[Shard]]] = {}
        self._expected = self._contributions_due()

    def owners_of(self, layer: int) -> dict[WorkerId, list[Shard]]:
        """The shards of the blocks that ``layer`` uses, by owner, each in the order of (block, start)."""
        if layer not in self._shards_of:
            owners = self._shards_of[layer] = {}
            for block in self._layout.blocks_of(layer, layer + 1):
                for shard in self.plan.shards_of(block.index):
                    owners.setdefault(shard.owner, []).append(shard)
        return self._shards_of[layer]

    def _contributions_due(self) -> int:
        """How many messages with gradients others send to this worker in one pass over the batch."""
        due = 0
        for stage in range(len(self.plan.stages)):
            first, stop = self.plan.stages[stage].first, self.plan.stages[stage].stop
            mine = sum(self._worker in self.owners_of(layer) for layer in range(first, stop))
            due += mine * sum(
                worker != self._worker and self.plan.passes(micro_batch, stage)
                for micro_batch, worker in enumerate(self.plan.assignment[stage])
            )
        return due

    def begin(self, step: int, attempt: int, *, sums: bool) -> None:
        self._channel = Tag(self.plan.generation, step, attempt, "contribution")
        self._left = self._expected if sums else 0
        if sums:
            device = self._stage.sums_device
            self._sums = {
                piece_of(shard): torch.zeros(shard.size, dtype=torch.float64, device=device)
                for shard in self.owned
            }

    def channels(self) -> Sequence[Tag]:
        return (self._channel,)

    def _collect(self, layer: int, gradients: Gradients, exponents: Sequence[int] | None) -> None:
        """Adds a layer's gradients of one micro-batch to their sums, here and at their owners'."""
        stage = self._stage
        flat = {
            block.index: torch.zeros(block.size, device=stage.sums_device)
            for block in self._layout.blocks_of(layer, layer + 1)
        }
        uses = {use.tensor.index: use for use in self._layout.uses_of(layer)}.values()
        for use, gradient in zip(uses, gradients, strict=True):
            if gradient is not None:
                tensor = use.tensor
                exponent = None if exponents is None else exponents[tensor.index]
                out_N = flat[use.block][tensor.offset : tensor.stop]
                contribution(gradient.to(out_N.device), exponent, stage.maxima_T[tensor.index], out_N)
        if exponents is None:
            return
        tag = self._channel._replace(index=layer)
        for owner, shards in self.owners_of(layer).items():
            parts = [flat[shard.block][shard.start : shard.stop] for shard in shards]
            if owner == self._worker:
                self._add(shards, parts)
            else:
                self._endpoint.send(owner, tag, parts)

    def take(self, message: Message) -> None:
        assert isinstance(message.tag.index, int), "the layer"
        self._add(self.owners_of(message.tag.index)[self._worker], message.tensors)
        self._left -= 1

    def _add(self, shards: Sequence[Shard], parts: Sequence[Tensor]) -> None:
        for shard, part in zip(shards, parts, strict=True):
            sums_N = self._sums[piece_of(shard)]
            sums_N.add_(part.to(sums_N.device))

    def finish(self) -> None:
        """Waits for what is still to come to this worker's shards."""
        while self._left:
            self.take(self._endpoint.receive_any((self._channel,)))

    def reduce(self, tag: Tag, accumulators: dict[int, Tensor], *, ordered: bool) -> dict[Piece, Tensor]:
        assert not ordered, "what comes as it is ready comes in any order"
        return self._sums

    @property
    def sums_bytes(self) -> int:
        return sum(shard.size for shard in self.owned) * torch.float64.itemsize
