"""One worker's part in a change of plan: state comes from peers, from a checkpoint or from the seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from runtime.checkpoint import CheckpointReader, load_manifest
from runtime.fabric.interface import Endpoint, Message, Tag
from runtime.layout import Layout
from runtime.moves import meet, parameters_of, tag_of
from runtime.plan import Plan, Shard, WorkerId
from runtime.protocol import Change, Resume
from runtime.pulse import Pulse
from runtime.resharding import Content, Transfer
from runtime.salvage import layers_of
from runtime.snapshots import ROWS, Piece, ShardStore
from strategies.job import Job
from strategies.model import build_model, flat_parameters
from strategies.options import Keeps
from strategies.residence import Residence
from strategies.stage import LayerTimes
from strategies.zero import piece_of

_ROWS_OF: Mapping[Content, Any] = {"parameters": 0, "moments": slice(1, ROWS), "state": slice(0, ROWS)}


class Working(Protocol):
    """Where full parameters are put: a stage's layers (``StageModel``), or host memory.

    ``working`` is flat by block; ``version`` the number of optimizer steps in it, None while it is being
    overwritten.
    """

    layout: Layout
    working: dict[int, Tensor]
    version: dict[int, int | None]
    accumulators: dict[int, Tensor]
    residence: Residence | None
    """Parameters that come and go, where they do."""
    pulse: Pulse

    def hold(self, *stages: tuple[int, int], keeps: Keeps | None = None) -> None:
        """Holds the layers of ``stages``, each the first and the one after the last, from now on; ``keeps``
        as in ``StageModel``."""
        ...

    def take_times(self) -> LayerTimes:
        """Seconds spent in each layer since the last call."""
        ...


@dataclass
class Mover:
    """Brings a worker from what it holds to what ``resume`` wants of it.

    ``move`` returns as soon as the next forward can run, which needs parameters only; optimizer state, which
    the update needs, may still be on its way and is taken in by ``settle``. It is sent to those alone who
    have asked for it, as they do once their parameters have come: else the state of the first ones to be
    ready would hold up the parameters that others stand still for.
    """

    job: Job
    layout: Layout
    endpoint: Endpoint
    worker: WorkerId
    stage: Working
    store: ShardStore
    resume: Resume
    handed_over: Collection[Transfer] = ()
    """What was sent before the boundary (``hand_over``)."""
    bytes_received: int = 0
    on_settled: Callable[[], None] = lambda: None
    """Called once, when everything that was owed has come."""
    _unsent: dict[WorkerId, list[Transfer]] = field(default_factory=dict)
    _asking: list[WorkerId] = field(default_factory=list)
    _missing: list[Shard] = field(default_factory=list)
    _fresh: dict[Shard, Tensor] = field(default_factory=dict)
    _owed: dict[tuple[WorkerId, object], Transfer] = field(default_factory=dict)
    _settled: bool = False

    def move(self) -> None:
        """Working parameters and held layers as the new plan has them, at its version."""
        plan, version = self.resume.plan, self.resume.version
        stages, keeps = layers_of(plan, self.worker).values(), self.job.keeps_under(plan)
        if self.resume.source == "peers":
            self.store.drop(after=version)
            self._begin_sending()  # from the held layers, which may be let go of now
            self.stage.hold(*stages, keeps=keeps)
            self._receive()
        else:
            self.store.clear()
            self.stage.hold(*stages, keeps=keeps)
            self.stage.version = dict.fromkeys(self.stage.version)
            if self.resume.source == "checkpoint":
                self._load_checkpoint()
            else:
                self._initialise()
        for block in self.stage.version:
            self.stage.version[block] = version

    def serve(self) -> None:
        """The part of a worker that has no work under the new plan: it sends what others need of it, and
        returns when they have asked for all of it."""
        self._begin_sending()
        while self._unsent:
            if not self._send_next():
                self._take(self.endpoint.receive_any(self._awaited()))

    def settle(self, *, wait: bool = True) -> None:
        """Sends the optimizer state that others are owed and takes in what this worker is;
        ``wait``: all of it, else a part of the work. Does nothing afterwards.

        Everybody sends before it waits, and state of this version stays in the store until the update.
        """
        if self._settled:
            return
        while self._unsent or self._missing or self._owed:
            if self._send_next() or self._put_together_next():
                if not wait:
                    return
                continue
            # both at once: what comes unasked for meanwhile would pile up unread
            awaited = self._awaited()
            message = self.endpoint.receive_any(awaited) if wait else self.endpoint.poll_any(awaited)
            if message is None:
                return
            self._take(message)
        for shard, state_3N in self._fresh.items():
            self.store.put(piece_of(shard), self.resume.version, state_3N)
        self._fresh.clear()
        self._settled = True
        self.on_settled()

    def _kept(self) -> list[Shard]:
        return list(self.resume.plan.kept_by(self.worker, self.layout))

    # --- from peers -------------------------------------------------------------------------

    def _channel(self, what: str) -> Tag:
        return Tag(self.resume.plan.generation, self.resume.version, 0, what)

    def _tag(self, transfer: Transfer) -> Tag:
        return tag_of(transfer, self.resume.plan.generation, self.resume.version)

    def _begin_sending(self) -> None:
        transfers = self.resume.transfers
        self._send(t for t in parameters_of(self.worker, transfers) if t not in self.handed_over)
        for transfer in reversed(transfers):
            if transfer.source == self.worker and transfer.what != "parameters":
                self._unsent.setdefault(transfer.target, []).append(transfer)

    def _awaited(self) -> list[Tag]:
        """Channels on which something is still to come."""
        asks = [self._channel("move asks")] if self._unsent else []
        return asks + ([self._channel("move state")] if self._owed else [])

    def _take(self, message: Message) -> None:
        if message.tag.what == "move asks":
            self._asking.append(message.sender)
        else:
            self._place(self._owed.pop((message.sender, message.tag.index)), message)

    def _send_next(self) -> bool:
        """Sends one piece of state to a worker that has asked for its own; whether there was one."""
        if not self._asking:
            return False
        owed = self._unsent[self._asking[0]]
        self._send([owed.pop()])
        if not owed:
            del self._unsent[self._asking.pop(0)]
        return True

    def _put_together_next(self) -> bool:
        """What this worker has of one shard that it is to keep; whether there was one."""
        if not self._missing:
            return False
        shard = self._missing.pop()
        self._fresh[shard] = self._local_parts(piece_of(shard), self.resume.version)
        return True

    def _send(self, transfers: Iterable[Transfer]) -> None:
        version = self.resume.version
        for transfer in transfers:
            piece = (transfer.block, transfer.start, transfer.stop)
            if transfer.what == "parameters" and self.stage.version.get(transfer.block) == version:
                tensor = self.stage.working[transfer.block][transfer.start : transfer.stop]
            else:
                state_3N = self.store.read(piece, version)
                assert state_3N is not None, f"{transfer} cannot be served at version {version}"
                tensor = state_3N[_ROWS_OF[transfer.what]]
            self.endpoint.send(transfer.target, self._tag(transfer), [tensor], background=True)

    def _receive(self) -> None:
        version = self.resume.version
        stale = {block for block, held in self.stage.version.items() if held != version}
        for block in stale:
            self.stage.version[block] = None  # neither the old version nor, until the end, the new one
            size = self.layout.blocks[block].size
            for start, stop, state_3N in self.store.parts((block, 0, size), version):
                self.stage.working[block][start:stop] = state_3N[0]
        # put together behind the next forward: what there is of them stays in the store until the update
        self._missing = [shard for shard in self._kept() if self.store.get(piece_of(shard), version) is None]
        coming = [transfer for transfer in self.resume.transfers if transfer.target == self.worker]
        owed = [transfer for transfer in coming if transfer.what != "parameters"]
        self._owed = {(transfer.source, self._tag(transfer).index): transfer for transfer in owed}
        for transfer in coming:
            if transfer.what == "parameters":
                message = self.endpoint.receive(transfer.source, self._tag(transfer))
                self.bytes_received += message.tensors[0].nbytes
                self.stage.working[transfer.block][transfer.start : transfer.stop] = message.tensors[0]
        for source in sorted({transfer.source for transfer in owed}):
            self.endpoint.send(source, self._channel("move asks"), background=True)

    def _local_parts(self, piece: Piece, version: int) -> Tensor:
        state_3N = self.store.buffer(piece[2] - piece[1])
        for start, stop, part in self.store.parts(piece, version):
            state_3N[:, start - piece[1] : stop - piece[1]] = part
        return state_3N

    def _place(self, transfer: Transfer, message: Message) -> None:
        """Puts a transfer into every new shard that it is a part of."""
        part = message.tensors[0]
        self.bytes_received += part.nbytes
        for shard, fresh_3N in self._fresh.items():
            if not meet(transfer, shard):
                continue
            start, stop = max(transfer.start, shard.start), min(transfer.stop, shard.stop)
            place = slice(start - shard.start, stop - shard.start)
            rows = _ROWS_OF[transfer.what]
            fresh_3N[rows, place] = part[:, start - transfer.start : stop - transfer.start]
            if transfer.what == "moments":
                fresh_3N[0, place] = self.stage.working[transfer.block][start:stop]

    # --- from a checkpoint or the seed ------------------------------------------------------

    def _load_checkpoint(self) -> None:
        root, version = self.resume.checkpoint, self.resume.version
        assert root is not None
        # what comes in between is not to wait until all is read
        with CheckpointReader(root, load_manifest(root, version), self.endpoint.check) as reader:
            for block, working in self.stage.working.items():
                working.copy_(reader.read_state(block, 0, self.layout.blocks[block].size)[0])
            for shard in self._kept():
                self.store.put(piece_of(shard), version, reader.read_state(*piece_of(shard)))

    def _initialise(self) -> None:
        with self.stage.pulse.long():
            model = build_model(self.job.build_model, self.job.seed)
        kept = self._kept()
        for block in self.layout.blocks:
            self.endpoint.check()
            shards = [shard for shard in kept if shard.block == block.index]
            working = self.stage.working.get(block.index)
            if not shards and working is None:
                continue
            flat_N = flat_parameters(model, block)
            if working is not None:
                working.copy_(flat_N)
            for shard in shards:
                state_3N = flat_N.new_zeros(ROWS, shard.size)
                state_3N[0] = flat_N[shard.start : shard.stop]
                self.store.put(piece_of(shard), 0, state_3N)


def hand_over(
    endpoint: Endpoint,
    worker: WorkerId,
    old: Plan,
    change: Change,
    version: int,
    new_states: Mapping[Piece, Tensor],
) -> frozenset[Transfer]:
    """Sends what ``worker`` has updated of the parameters that move at the boundary after ``version`` steps,
    before it gathers the others': who takes a layer over then has it as soon as its owners have, and need
    not stand still until they have come to the boundary too. Returns what was sent.

    To those alone who are at work under ``old``: what newcomers get is more, for whom nobody stands still,
    and would hold up the gather. ``new_states`` (3, n) are those of the owned shards; they stay as they are,
    as for backups.
    """
    handed_over: set[Transfer] = set()
    for transfer in parameters_of(worker, change.transfers):
        if transfer.target not in old.workers:
            continue
        for (block, start, stop), state_3N in new_states.items():
            if block == transfer.block and start <= transfer.start and transfer.stop <= stop:
                part = state_3N[0, transfer.start - start : transfer.stop - start]
                tag = tag_of(transfer, change.plan.generation, version)
                endpoint.send(transfer.target, tag, [part], background=True)
                handed_over.add(transfer)
    return frozenset(handed_over)
