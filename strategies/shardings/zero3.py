"""ZeRO-3: nobody keeps more parameters than those of the shards that it owns and backs up.

A layer's parameters come together from their owners just before its forward and again before its backward,
and are let go of right after; those of the layer that follows are asked for before it computes (Rajbhandari
et al., "ZeRO", SC'20, sec. 5.3; prefetching as in Rajbhandari et al., "ZeRO-Infinity", SC'21, sec. 6.2). So
no more than two layers' parameters are there at once. Gradients go to the owners as under ZeRO-2, and no
parameters follow the update.

Workers of a stage group go through their micro-batches at their own pace. So parameters are asked for, not
broadcast: owners answer while they wait and between two of their own layers, and stay until everybody has
said that it needs nothing any more.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from runtime.fabric.interface import Message, Tag
from runtime.plan import WorkerId
from runtime.snapshots import Piece, ShardStore
from strategies.residence import Residence
from strategies.shardings.zero2 import GradientRounds
from strategies.stage import StageModel
from strategies.zero import piece_of

_DONE = -1
"""Asked for in place of a layer: nothing more in this pass over the batch."""


class ParameterRounds(GradientRounds):
    """The rounds of ZeRO-3, and the window that its stage computes in."""

    def join(self, stage: StageModel, store: ShardStore) -> None:
        super().join(stage, store)
        stage.window = self
        assert stage.residence is not None
        self._residence: Residence = stage.residence
        self._residence.clear()
        self._store = store
        self._version = 0
        self._asked = self._sent = Tag(self.plan.generation, 0, 0, "parameters")
        self._missing: dict[int, int] = {}
        """By layer that is here or on its way: how many owners have yet to answer."""
        self._used: Counter[int] = Counter()
        """By block: how many of those layers use it."""
        layers = range(self._layout.layers)
        self._owners = {
            owner for each in stage.held for layer in range(*each) for owner in self.owners_of(layer)
        }
        mine = [layer for layer in layers if self._worker in self.owners_of(layer)]
        self._users = {worker for layer in mine for worker in self.plan.holders((layer,))} - {self._worker}
        self._busy: set[WorkerId] = set()

    def begin(self, step: int, attempt: int, *, sums: bool) -> None:
        super().begin(step, attempt, sums=sums)
        self._version = step - 1
        generation = self.plan.generation
        self._asked = Tag(generation, step, attempt, "parameters wanted")
        self._sent = Tag(generation, step, attempt, "parameters")
        self._busy = set(self._users)

    def channels(self) -> Sequence[Tag]:
        return (self._asked, self._sent, *super().channels())

    def take(self, message: Message) -> None:
        layer = message.tag.index
        assert isinstance(layer, int)
        if message.tag.what == self._asked.what:
            if layer == _DONE:
                self._busy.remove(message.sender)
            else:
                self._endpoint.send(message.sender, self._sent._replace(index=layer), self._parts(layer))
        elif message.tag.what == self._sent.what:
            self._place(layer, message.sender, message.tensors)
            self._missing[layer] -= 1
        else:
            super().take(message)

    def finish(self) -> None:
        """Waits until nobody needs parameters of this worker, and for what is to come to its sums."""
        assert not self._missing, "parameters that nobody let go of"
        for owner in sorted(self._owners - {self._worker}):
            self._endpoint.send(owner, self._asked._replace(index=_DONE))
        while self._busy:
            self.take(self._endpoint.receive_any(self.channels()))
        super().finish()

    def enter(self, layer: int, following: int | None) -> None:
        self._ask(layer)
        if following is not None:
            self._ask(following)
        began = time.perf_counter()
        while self._missing[layer]:
            self.take(self._endpoint.receive_any(self.channels()))
        self.waited += time.perf_counter() - began

    def leave(self, layer: int) -> None:
        del self._missing[layer]
        for block in self._layout.blocks_of(layer, layer + 1):
            self._used[block.index] -= 1
            if not self._used[block.index]:
                self._residence.vacate(block.index)

    def renew(self) -> None:
        """Nothing stays from one step to the next."""

    def _ask(self, layer: int) -> None:
        if layer in self._missing:
            return
        for block in self._layout.blocks_of(layer, layer + 1):
            self._used[block.index] += 1
            self._residence.occupy(block.index)
        owners = self.owners_of(layer)
        self._missing[layer] = len(owners.keys() - {self._worker})
        for owner in owners:
            if owner == self._worker:
                self._place(layer, owner, self._parts(layer))
            else:
                self._endpoint.send(owner, self._asked._replace(index=layer))

    def _parts(self, layer: int) -> list[Tensor]:
        """This worker's part of a layer's parameters."""
        parts = []
        for shard in self.owners_of(layer)[self._worker]:
            state_3N = self._store.get(piece_of(shard), self._version)
            assert state_3N is not None, f"{shard} is not held in version {self._version}"
            parts.append(state_3N[0])
        return parts

    def _place(self, layer: int, owner: WorkerId, parts: Sequence[Tensor]) -> None:
        for shard, part in zip(self.owners_of(layer)[owner], parts, strict=True):
            self._residence.flats[shard.block][shard.start : shard.stop] = part

    def gather(self, tag: Tag, working: dict[int, Tensor], new_states: dict[Piece, Tensor]) -> None:
        """Nothing: parameters are asked for when they are needed."""

    def send_backups(self, tag: Tag, new_states: dict[Piece, Tensor], *, whole: bool = True) -> None:
        super().send_backups(tag, new_states, whole=True)
