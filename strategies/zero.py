"""ZeRO-1: sums to their owners, parameters back to the stage group, copies to the backups.

Optimizer states are divided over the data-parallel group (Rajbhandari et al., "ZeRO", SC'20,
sec. 5.1). Other shardings (``strategies.shardings``) differ from it in some of the rounds. Each function is
one round of messages: a worker sends every peer one message with all the slices meant for it, in the order of
``plan.shards``, which both sides know.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from runtime.fabric.interface import Endpoint, Message, Tag
from runtime.grouping import grouped
from runtime.layout import Layout
from runtime.plan import Plan, Shard, WorkerId
from runtime.snapshots import Piece, ShardStore
from strategies.stage import StageModel


def piece_of(shard: Shard) -> Piece:
    return shard.block, shard.start, shard.stop


class ZeroRounds:
    """The rounds of one plan for one worker: who gets what is worked out once."""

    def __init__(self, endpoint: Endpoint, plan: Plan, layout: Layout, worker: WorkerId) -> None:
        self.plan = plan
        self.owned = tuple(plan.owned_by(worker))
        self._endpoint = endpoint
        self._layout = layout
        self._worker = worker
        self._holders = {block.index: plan.holders(block.layers) for block in layout.blocks}
        mine = {block for block, workers in self._holders.items() if worker in workers}
        self._to_owner: dict[WorkerId, list[Shard]] = {}
        self._from_owner = self._to_owner  # what I add to at its owner is what I get back from it
        for shard in plan.shards:
            if shard.block in mine and shard.owner != worker:
                self._to_owner.setdefault(shard.owner, []).append(shard)
        self._to_holder: dict[WorkerId, list[Shard]] = {}
        for shard in self.owned:
            for holder in self._holders[shard.block]:
                if holder != worker:
                    self._to_holder.setdefault(holder, []).append(shard)
        by_backup = grouped(self.owned, lambda shard: shard.backup)
        self._to_backup = {backup: shards for backup, shards in by_backup.items() if backup is not None}
        self._backed_up = grouped(plan.backed_up_by(worker), lambda shard: shard.owner)
        self.waited = 0.0
        """Seconds for which layers waited for their parameters."""
        self._coming: set[WorkerId] = set()

    def join(self, stage: StageModel, store: ShardStore) -> None:
        """These rounds go with ``stage`` from now on; ``store`` has the shards."""
        stage.collect = stage.window = None

    def begin(self, step: int, attempt: int, *, sums: bool) -> None:
        """Passes of micro-batches come next (attempt 0: held-out ones); ``sums``: there is what to add up."""

    def channels(self) -> Sequence[Tag]:
        """What comes beside the micro-batches' own messages during passes; ``take`` deals with it."""
        return ()

    def take(self, message: Message) -> None:
        raise AssertionError(f"nothing comes beside micro-batches: {message.tag}")

    @property
    def sums_bytes(self) -> int:
        """Bytes of sums that these rounds keep in place of the stage."""
        return 0

    def finish(self) -> None:
        """After this worker's passes: waits until nobody needs anything of it for theirs."""

    def reduce(self, tag: Tag, accumulators: dict[int, Tensor], *, ordered: bool) -> dict[Piece, Tensor]:
        """Sums every owned shard over its stage group(s). ``accumulators`` stay as they are: should the step
        be interrupted, it goes on from them. So nothing may be written to what is returned: where nobody adds
        to it, it is a part of them.

        ``ordered`` adds in ascending worker order (for floating-point sums, which depend on it);
        otherwise in the order in which the peers' parts arrive.
        """
        for owner, shards in self._to_owner.items():
            parts = [accumulators[shard.block][shard.start : shard.stop] for shard in shards]
            self._endpoint.send(owner, tag, parts)
        sums = {piece_of(shard): accumulators[shard.block][shard.start : shard.stop] for shard in self.owned}
        if not self._to_holder:
            return sums
        sums = {piece: part.clone() for piece, part in sums.items()}
        if ordered:
            self._add_in_order(tag, sums)
        else:
            for _ in self._to_holder:
                message = self._endpoint.receive_any([tag])
                shards = self._to_holder[message.sender]
                for shard, part in zip(shards, message.tensors, strict=True):
                    sums[piece_of(shard)].add_(part.to(sums[piece_of(shard)].device))
        return sums

    def _add_in_order(self, tag: Tag, sums: dict[Piece, Tensor]) -> None:
        own = {piece: part.clone() for piece, part in sums.items()}
        for part in sums.values():
            part.zero_()
        for sender in sorted([*self._to_holder, self._worker]):
            if sender == self._worker:
                for piece, part in own.items():
                    sums[piece].add_(part)
                continue
            message = self._endpoint.receive(sender, tag)
            for shard, part in zip(self._to_holder[sender], message.tensors, strict=True):
                sums[piece_of(shard)].add_(part.to(sums[piece_of(shard)].device))

    def spread(self, tag: Tag, gradients: dict[Piece, Tensor]) -> dict[Piece, Tensor]:
        """From the owned shards' mean gradients (float32) to those of all shards that are updated here."""
        return gradients

    def gather(self, tag: Tag, working: dict[int, Tensor], new_states: dict[Piece, Tensor]) -> None:
        """Brings the owners' new parameters into every holder's working parameters."""
        for holder, shards in self._to_holder.items():
            self._endpoint.send(holder, tag, [new_states[piece_of(shard)][0] for shard in shards])
        for shard in self.owned:
            working[shard.block][shard.start : shard.stop] = new_states[piece_of(shard)][0]
        for _ in self._from_owner:
            message = self._endpoint.receive_any([tag])
            for shard, part in zip(self._from_owner[message.sender], message.tensors, strict=True):
                working[shard.block][shard.start : shard.stop] = part

    def send_backups(self, tag: Tag, new_states: dict[Piece, Tensor], *, whole: bool = False) -> None:
        """Starts sending each owned shard's new state to its backup; nobody waits for it here.

        The parameters stay at home where the backup holder gets them by ``gather`` anyway, unless ``whole``
        says that nobody gathers.
        """
        for backup, shards in self._to_backup.items():
            parts: list[Tensor] = []
            for shard in shards:
                state_3N = new_states[piece_of(shard)]
                gathers = not whole and backup in self._holders[shard.block]
                parts.append(state_3N[1:] if gathers else state_3N)
            self._endpoint.send(backup, tag, parts, background=True)

    def expect_backups(self) -> None:
        """From now on, copies of the state just sent by everybody are on their way here."""
        self._coming = set(self._backed_up)

    @property
    def awaits_backups(self) -> bool:
        """Whether copies are still on their way here."""
        return bool(self._coming)

    def take_backups(
        self, tag: Tag, working: dict[int, Tensor], store: ShardStore, version: int, *, wait: bool
    ) -> None:
        """Keeps the copies of ``version`` that have come for this worker; with ``wait``, all of them.

        ``working`` must hold the parameters of ``version``.
        """
        while self._coming:
            message = self._endpoint.receive_any([tag]) if wait else self._endpoint.poll_any([tag])
            if message is None:
                return
            for shard, part in zip(self._backed_up[message.sender], message.tensors, strict=True):
                # into memory of a dropped version, or that would lie there unused
                state_3N = store.buffer(shard.size)
                if part.shape[0] == 2:
                    state_3N[0] = working[shard.block][shard.start : shard.stop]
                    state_3N[1:] = part
                else:
                    state_3N.copy_(part)
                store.put(piece_of(shard), version, state_3N)
            self._coming.discard(message.sender)
