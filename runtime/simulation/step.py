"""One training step of a simulated worker; the twin of ``strategies.step.StepRunner`` and what it uses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from runtime.events import StepRecord
from runtime.fabric.collectives import DIRECT_MEMBERS
from runtime.fabric.interface import Tag
from runtime.layout import ALIGNMENT
from runtime.plan import Plan, Shard, WorkerId
from runtime.protocol import Exponents
from runtime.salvage import Salvage, layers_of
from runtime.simulation.move import SimMover, piece_of
from runtime.simulation.pipeline import SimPipeline
from runtime.simulation.process import Waits
from runtime.simulation.toy import FINGERPRINT_MODULUS

if TYPE_CHECKING:
    from runtime.simulation.worker import SimWorker


@dataclass(frozen=True)
class Share:
    """One worker's part of a step's outcome; see ``strategies.share.Share``."""

    losses: dict[int, int] = field(default_factory=dict)
    fingerprint: int = 0
    stop: bool = False
    change: int = 0


@dataclass(frozen=True)
class Outcome:
    """What all shares together say; ``micro_batches`` are those whose loss was reported, with repetition."""

    loss: int
    micro_batches: tuple[int, ...]
    fingerprint: int
    stop: bool
    change: int


class SimStep:
    """Runs steps under one plan."""

    def __init__(
        self, worker: SimWorker, plan: Plan, mover: SimMover, salvage: Salvage | None = None
    ) -> None:
        self.me = worker.worker
        self.worker, self.plan, self.mover = worker, plan, mover
        self.endpoint, self.stage, self.store = worker.endpoint, worker.stage, worker.store
        layout = self.stage.layout
        self.owned = tuple(plan.owned_by(self.me))
        self._holders = {block.index: plan.holders(block.layers) for block in layout.blocks}
        self._to_owner: dict[WorkerId, list[Shard]] = {}
        for shard in plan.shards:
            if self.me in self._holders[shard.block] and shard.owner != self.me:
                self._to_owner.setdefault(shard.owner, []).append(shard)
        self._to_holder: dict[WorkerId, list[Shard]] = {}
        self._to_backup: dict[WorkerId, list[Shard]] = {}
        for shard in self.owned:
            for holder in self._holders[shard.block]:
                if holder != self.me:
                    self._to_holder.setdefault(holder, []).append(shard)
            if shard.backup is not None:
                self._to_backup.setdefault(shard.backup, []).append(shard)
        self._backed_up: dict[WorkerId, list[Shard]] = {}
        for shard in plan.backed_up_by(self.me):
            self._backed_up.setdefault(shard.owner, []).append(shard)
        self._coming: set[WorkerId] = set()
        self._pipeline, self._salvage = SimPipeline(self, plan), salvage

    def run(self, version: int, *, is_last: bool) -> Waits[Outcome]:
        """Computes step ``version`` + 1 and commits it; the outcome speaks of the step's beginning."""
        worker, step = self.worker, version + 1
        began = worker.process.clock.now
        exponents, attempt = worker.exponents[version], 1
        while True:
            result, sums = yield from self._attempt(step, attempt, exponents)
            fits = exponents is not None and (len(exponents) == 2 or not worker.model.outgrows(step))
            if fits:
                break
            attempt += 1
            if exponents is not None:
                worker.tell_repeat(self.plan.workers[0], step, attempt)
            exponents = (version, 1)
        worker.watch.batch(step, result.micro_batches)
        worker.complete(version, result)
        record = StepRecord(
            step=step,
            loss=result.loss / worker.model.micro_batches,
            grad_norm=0.0,
            learning_rate=0.0,
            samples=len(result.micro_batches),
            tokens=0,
            seconds=worker.process.clock.now - began,
            workers=len(self.plan.workers),
            generation=self.plan.generation,
            fingerprint=0,
            attempts=attempt,
            committed_at=worker.process.clock.now,
        )
        worker.records[step] = record
        self.store.drop(before=version)
        new_values = yield from self._update(step, sums)
        worker.exponents[version + 1] = (step,)
        worker.exponents = {v: kept for v, kept in worker.exponents.items() if v >= version}
        if is_last or result.stop or result.change <= self.plan.generation:
            result = replace(result, change=0)
        else:
            worker.hand_over(result.change, step, new_values)
        yield from self._gather(step, attempt, new_values)
        yield from worker.fault("backup")
        if not result.change:
            self._send_backups(step, new_values)
        return result

    def conclude(self, version: int) -> Waits[Outcome]:
        """The exchange after the last step."""
        return (yield from self._exchange(version + 1, 1, {}))

    def _tag(self, step: int, attempt: int, what: str, index: int = 0) -> Tag:
        return Tag(self.plan.generation, step, attempt, what, index)

    def _attempt(
        self, step: int, attempt: int, exponents: Exponents
    ) -> Waits[tuple[Outcome, dict[Shard, int]]]:
        salvage, progress = self._salvage, self.worker.progress
        if attempt > 1 or salvage is None or salvage.step != step:
            salvage = None
        if salvage is None or self.me not in salvage.contributors:
            self.stage.clear_gradients()
            progress.begin(step, attempt, layers_of(self.plan, self.me))
        else:
            self.worker.watch.salvaged(self.me, len(progress.done))
        losses = yield from self._pipeline.train(progress, salvage)
        sums: dict[Shard, int] = {}
        if exponents is not None:
            sums = yield from self._reduce(step, attempt)
        return (yield from self._exchange(step, attempt, losses)), sums

    def take_what_came(self, version: int) -> Waits[None]:
        """Between micro-batches: what should not wait for the end of the pass."""
        yield from self.mover.settle(wait=False)
        yield from self._take_backups(version, wait=False)

    # --- ZeRO -------------------------------------------------------------------------------

    def _reduce(self, step: int, attempt: int) -> Waits[dict[Shard, int]]:
        yield from self.worker.fault("reduce")
        tag = self._tag(step, attempt, "reduce")
        for owner, shards in self._to_owner.items():
            self.endpoint.send(owner, tag, [self.stage.accumulators[shard.block] for shard in shards])
        sums = {shard: self.stage.accumulators[shard.block] for shard in self.owned}
        for _ in self._to_holder:
            message = yield from self.endpoint.receive_any([tag])
            for shard, part in zip(self._to_holder[message.sender], message.note, strict=True):
                sums[shard] += part
        return sums

    def _update(self, step: int, sums: dict[Shard, int]) -> Waits[dict[Shard, list[int]]]:
        yield from self.worker.fault("optimizer")
        yield self.worker.process.random.uniform(0.0, 0.004)
        new_values: dict[Shard, list[int]] = {}
        for shard in self.owned:
            old = self.store.get(piece_of(shard), step - 1)
            assert old is not None, f"{shard} is not held in version {step - 1}"
            first = shard.start // ALIGNMENT
            new_values[shard] = [
                self.worker.model.updated(value, sums[shard], first + i) for i, value in enumerate(old)
            ]
        for shard, values in new_values.items():
            self.store.put(piece_of(shard), step, values)
        self.worker.watch.committed(self.me, self.plan, step)
        return new_values

    def _gather(self, step: int, attempt: int, new_values: dict[Shard, list[int]]) -> Waits[None]:
        yield from self.worker.fault("gather")
        self.stage.version = dict.fromkeys(self.stage.version)
        tag = self._tag(step, attempt, "gather")
        for holder, shards in self._to_holder.items():
            self.endpoint.send(holder, tag, [new_values[shard] for shard in shards])
        for shard in self.owned:
            self.stage.write(shard.block, shard.start, new_values[shard])
        for _ in self._to_owner:
            message = yield from self.endpoint.receive_any([tag])
            for shard, values in zip(self._to_owner[message.sender], message.note, strict=True):
                self.stage.write(shard.block, shard.start, values)
        self.stage.version = dict.fromkeys(self.stage.version, step)

    def _send_backups(self, step: int, new_values: dict[Shard, list[int]]) -> None:
        """The parameters stay at home where the backup holder gets them by the gather anyway."""
        tag = self._tag(step, 0, "backup")
        for backup, shards in self._to_backup.items():
            parts = [None if backup in self._holders[s.block] else new_values[s] for s in shards]
            self.endpoint.send(backup, tag, parts, background=True)
        self._coming = set(self._backed_up)

    def _take_backups(self, version: int, *, wait: bool) -> Waits[None]:
        tag = self._tag(version, 0, "backup")
        while self._coming:
            message = (yield from self.endpoint.receive_any([tag])) if wait else self.endpoint.poll_any([tag])
            if message is None:
                return
            for shard, part in zip(self._backed_up[message.sender], message.note, strict=True):
                values = part or self.stage.read(*piece_of(shard))
                self.store.put(piece_of(shard), version, values)
            self._coming.discard(message.sender)

    # --- the exchange -----------------------------------------------------------------------

    def _exchange(self, step: int, attempt: int, losses: dict[int, int]) -> Waits[Outcome]:
        """Every worker's share. Nobody gets it before all copies of the last version are in place."""
        yield from self.mover.settle(wait=True)
        yield from self._take_backups(step - 1, wait=True)
        yield from self.worker.fault("exchange")
        fingerprint = 0
        for shard in self.owned:
            values = self.store.get(piece_of(shard), step - 1)
            assert values is not None, f"{shard} is not held in version {step - 1}"
            fingerprint += sum(values)
        share = Share(losses, fingerprint, self.worker.stop_requested, self.worker.pending_generation())
        self.worker.watch.shared(self.me, self.plan, step, attempt)
        shares = yield from self._all_gather(self._tag(step, attempt, "exchange"), share)
        result = Outcome(
            loss=sum(sum(each.losses.values()) for each in shares.values()),
            micro_batches=tuple(sorted(m for each in shares.values() for m in each.losses)),
            fingerprint=sum(each.fingerprint for each in shares.values()) % FINGERPRINT_MODULUS,
            stop=any(each.stop for each in shares.values()),
            change=min(each.change for each in shares.values()),
        )
        yield self.worker.process.random.uniform(0.0, 0.001)
        return result

    def _all_gather(self, tag: Tag, share: Share) -> Waits[dict[WorkerId, Share]]:
        """See ``fabric.collectives.exchange``."""
        members, me = self.plan.workers, self.me
        if len(members) <= DIRECT_MEMBERS:
            for member in members:
                if member != me:
                    self.endpoint.send(member, tag, share)
            shares = {me: share}
            for member in members:
                if member != me:
                    shares[member] = (yield from self.endpoint.receive(member, tag)).note
            return shares
        root, others = members[0], members[1:]
        if me != root:
            self.endpoint.send(root, tag, share)
            gathered: Any = (yield from self.endpoint.receive(root, tag)).note
            return dict(gathered)
        shares = {root: share}
        for member in others:
            shares[member] = (yield from self.endpoint.receive(member, tag)).note
        for member in others:
            self.endpoint.send(member, tag, shares)
        return shares
