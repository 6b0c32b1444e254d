"""A simulated worker's part in a change of plan; the twin of ``strategies.move.Mover``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.fabric.interface import Message, Tag
from runtime.layout import ALIGNMENT
from runtime.moves import meet, parameters_of, tag_of
from runtime.plan import Plan, Shard, WorkerId
from runtime.protocol import Change, Resume
from runtime.resharding import Transfer
from runtime.salvage import layers_of
from runtime.simulation.process import Waits
from runtime.snapshots import Piece

if TYPE_CHECKING:
    from runtime.simulation.worker import SimWorker


def piece_of(shard: Shard) -> Piece:
    return shard.block, shard.start, shard.stop


class SimMover:
    """``move`` returns as soon as the next forward can run; ``settle`` takes in what is still owed."""

    def __init__(
        self,
        worker: SimWorker,
        resume: Resume,
        handed_over: Collection[Transfer],
        on_settled: Callable[[], None],
    ) -> None:
        self.me = worker.worker
        self.worker, self.resume = worker, resume
        self.endpoint, self.stage, self.store = worker.endpoint, worker.stage, worker.store
        self.received = 0
        self._handed_over = handed_over
        self._on_settled = on_settled
        self._fresh: dict[Shard, list[int | None]] = {}
        self._owed: dict[tuple[WorkerId, object], Transfer] = {}
        self._unsent: dict[WorkerId, list[Transfer]] = {}
        self._settled = False

    def move(self) -> Waits[None]:
        plan, version = self.resume.plan, self.resume.version
        stages = layers_of(plan, self.me).values()
        if self.resume.source == "peers":
            self.store.drop(after=version)
            self._begin_sending()
            yield from self.worker.fault("move")
            self.stage.hold(*stages)
            yield from self._receive()
        else:
            self.store.clear()
            self.stage.hold(*stages)
            self.stage.version = dict.fromkeys(self.stage.version)
            yield self.worker.process.random.uniform(0.0, 0.05)
            self._load()
        self.stage.version = dict.fromkeys(self.stage.version, version)

    def serve(self) -> Waits[None]:
        """The part of a worker that has no work under the new plan."""
        self._begin_sending()
        while self._unsent:
            self._take((yield from self.endpoint.receive_any([self._channel("move asks")])))

    def settle(self, *, wait: bool) -> Waits[None]:
        if self._settled:
            return
        tags = [self._channel("move asks"), self._channel("move state")]
        while self._unsent or self._owed:
            message = (yield from self.endpoint.receive_any(tags)) if wait else self.endpoint.poll_any(tags)
            if message is None:
                return
            self._take(message)
        for shard in list(self._fresh):
            self._put(shard)
        self._settled = True
        self._on_settled()

    def _channel(self, what: str) -> Tag:
        return Tag(self.resume.plan.generation, self.resume.version, 0, what)

    def _tag(self, transfer: Transfer) -> Tag:
        return tag_of(transfer, self.resume.plan.generation, self.resume.version)

    def _begin_sending(self) -> None:
        transfers = self.resume.transfers
        self._send(t for t in parameters_of(self.me, transfers) if t not in self._handed_over)
        for transfer in transfers:
            if transfer.source == self.me and transfer.what != "parameters":
                self._unsent.setdefault(transfer.target, []).append(transfer)

    def _take(self, message: Message) -> None:
        if message.tag.what == "move asks":
            self._send(self._unsent.pop(message.sender))
        else:
            self._place(self._owed.pop((message.sender, message.tag.index)), message)

    def _send(self, transfers: Iterable[Transfer]) -> None:
        version = self.resume.version
        for transfer in transfers:
            piece = (transfer.block, transfer.start, transfer.stop)
            if transfer.what == "parameters" and self.stage.version.get(transfer.block) == version:
                values: tuple[int, ...] | None = self.stage.read(*piece)
            else:
                values = self.store.read(piece, version)
            assert values is not None, f"{transfer} cannot be served at version {version}"
            self.endpoint.send(transfer.target, self._tag(transfer), values, background=True)

    def _receive(self) -> Waits[None]:
        version = self.resume.version
        stale = {block for block, held in self.stage.version.items() if held != version}
        for block in stale:
            self.stage.version[block] = None
            size = self.stage.layout.blocks[block].size
            for start, _, values in self.store.parts((block, 0, size), version):
                self.stage.write(block, start, values)
        plan = self.resume.plan
        for shard in (*plan.owned_by(self.me), *plan.backed_up_by(self.me)):
            if self.store.get(piece_of(shard), version) is None:
                self._fresh[shard] = self._local_parts(shard)
        coming = [transfer for transfer in self.resume.transfers if transfer.target == self.me]
        owed = [transfer for transfer in coming if transfer.what != "parameters"]
        self._owed = {(transfer.source, self._tag(transfer).index): transfer for transfer in owed}
        for shard in list(self._fresh):
            if not any(meet(transfer, shard) for transfer in owed):
                self._put(shard)
        for transfer in coming:
            if transfer.what == "parameters":
                message = yield from self.endpoint.receive(transfer.source, self._tag(transfer))
                self.received += transfer.bytes
                self.stage.write(transfer.block, transfer.start, message.note)
        for source in sorted({transfer.source for transfer in owed}):
            self.endpoint.send(source, self._channel("move asks"), background=True)

    def _local_parts(self, shard: Shard) -> list[int | None]:
        values: list[int | None] = [None] * (shard.size // ALIGNMENT)
        for start, stop, part in self.store.parts(piece_of(shard), self.resume.version):
            values[(start - shard.start) // ALIGNMENT : (stop - shard.start) // ALIGNMENT] = part
        return values

    def _place(self, transfer: Transfer, message: Message) -> None:
        self.received += transfer.bytes
        for shard, fresh in self._fresh.items():
            if meet(transfer, shard):
                start, stop = max(transfer.start, shard.start), min(transfer.stop, shard.stop)
                first, last = (start - transfer.start) // ALIGNMENT, (stop - transfer.start) // ALIGNMENT
                place = slice((start - shard.start) // ALIGNMENT, (stop - shard.start) // ALIGNMENT)
                fresh[place] = message.note[first:last]

    def _put(self, shard: Shard) -> None:
        values = [value for value in self._fresh.pop(shard) if value is not None]
        self.store.put(piece_of(shard), self.resume.version, values)

    def _load(self) -> None:
        """State from the durable checkpoint, or the initial one."""
        version, layout = self.resume.version, self.stage.layout
        if self.resume.source == "checkpoint":
            files = self.worker.storage.read(version)
            whole: dict[int, list[int]] = {block.index: [] for block in layout.blocks}
            for (block, _, _), values in sorted(files.items()):
                whole[block] += values
        else:
            first = self.worker.reference.state(0)
            whole = {block: list(values) for block, values in enumerate(first)}
        for block in self.stage.working:
            self.stage.write(block, 0, whole[block])
        plan = self.resume.plan
        for shard in (*plan.owned_by(self.me), *plan.backed_up_by(self.me)):
            units = slice(shard.start // ALIGNMENT, shard.stop // ALIGNMENT)
            self.store.put(piece_of(shard), version, whole[shard.block][units])


def hand_over(
    worker: SimWorker, old: Plan, change: Change, version: int, new_values: Mapping[Shard, Sequence[int]]
) -> frozenset[Transfer]:
    """See ``strategies.move.hand_over``."""
    handed_over: set[Transfer] = set()
    for transfer in parameters_of(worker.worker, change.transfers):
        if transfer.target not in old.workers:
            continue
        for shard, values in new_values.items():
            if meet(transfer, shard) and shard.start <= transfer.start and transfer.stop <= shard.stop:
                first, last = ((at - shard.start) // ALIGNMENT for at in (transfer.start, transfer.stop))
                tag = tag_of(transfer, change.plan.generation, version)
                worker.endpoint.send(transfer.target, tag, tuple(values[first:last]), background=True)
                handed_over.add(transfer)
    return frozenset(handed_over)
