"""One training step of one engine rank: micro-batches, exchange, update, copies to the backup."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from actors.engines.engine import Engine, Overlap
from actors.engines.held import HostParameters
from runtime.events import StepRecord
from runtime.exact import fingerprint
from runtime.fabric.collectives import exchange
from runtime.fabric.interface import Endpoint, Tag
from runtime.layout import Layout
from runtime.plan import Plan, WorkerId
from runtime.protocol import Exponents
from runtime.samples import Samples, count
from runtime.snapshots import ROWS, Piece, ShardStore
from runtime.spans import EXCHANGE, OPTIMIZER, SpanLog
from strategies.engine import turns
from strategies.job import Job
from strategies.pipeline import Data, FaultPoint
from strategies.reading import Side, Wanted, announce, heed, read
from strategies.salvage import Losses
from strategies.share import Outcome, Share, outcome
from strategies.step import StepSeconds
from strategies.zero import ZeroRounds, piece_of


@dataclass
class EngineRunner:
    """The counterpart of ``strategies.step.StepRunner``: the same rounds in the same order, but gradients,
    sums and the update are the engine's. Arguments of the same name mean the same.

    ``exponents[v]`` are the engine's scalars of version v (``actors.engines.scalars``).
    """

    job: Job
    layout: Layout
    endpoint: Endpoint
    plan: Plan
    worker: WorkerId
    stage: HostParameters
    store: ShardStore
    data: Data
    fault: FaultPoint
    exponents: dict[int, Exponents]
    stop_requested: Callable[[], bool]
    pending_change: Callable[[], int]
    known: Callable[[int, Outcome], None]
    remember: Callable[[StepRecord], None]
    engine: Engine
    overlaps: list[Overlap]
    spans: SpanLog
    seconds: StepSeconds = field(default_factory=StepSeconds)

    def __post_init__(self) -> None:
        self.rounds = ZeroRounds(self.endpoint, self.plan, self.layout, self.worker)
        heed(self.data, self.endpoint.check)
        ranks = len(self.plan.workers)
        self._rank = self.plan.workers.index(self.worker)
        self._ranks = ranks
        self._turns = turns(self.plan.micro_batches_of(self.worker), self.job.micro_batches, ranks)

    def run(self, version: int, *, is_last: bool = False) -> Outcome:
        """Computes step ``version`` + 1 and commits it. The outcome speaks of the step's beginning.

        Raises Interrupted when the membership changes, RuntimeError where a collective was cut short.
        """
        step, began = version + 1, time.perf_counter()
        self.seconds = StepSeconds()
        share = Share(held_out=self._evaluate() if self._evaluates_at(version) else {})
        self._accumulate(step, share)
        # nobody updates before all copies of the version before are in place
        shares = self._exchange(step, share)
        result = outcome(shares)
        self.known(version, result)
        self.fault("optimizer", step, 0)
        optimizing, optimizing_ns = time.perf_counter(), time.perf_counter_ns()
        rate = self.engine.rate(step)
        self.engine.advance(step)
        self.seconds.optimizer = time.perf_counter() - optimizing
        self.spans.add(OPTIMIZER, optimizing_ns)
        rows = self.job.micro_batches * self.job.micro_batch_size
        record = StepRecord(
            step=step,
            loss=result.loss,
            grad_norm=self.engine.gradient_norm,
            learning_rate=rate,
            samples=sum(count(samples) for _, samples in result.read) if result.read else rows,
            tokens=rows * self.job.tokens_per_sample,
            seconds=time.perf_counter() - began,
            workers=self._ranks,
            generation=self.plan.generation,
            fingerprint=0,
            committed_at=time.time(),
            read=result.read,
        )
        self.remember(record)
        self.store.drop(before=version)
        states = self._snapshot(step)
        self.exponents[step] = self.engine.counted()
        for old in [v for v in self.exponents if v < version]:
            del self.exponents[old]
        self.fault("backup", step, 0)
        if is_last or result.stop or result.change <= self.plan.generation:
            result = replace(result, change=0)
            self.rounds.send_backups(self._tag(step, "backup"), states, whole=True)
            self.rounds.expect_backups()
        else:
            self._gather(step, states)
        self.remember(replace(record, seconds=time.perf_counter() - began, committed_at=time.time()))
        return result

    def conclude(self, version: int) -> Outcome:
        """The exchange after the last step: its fingerprint and the last held-out loss."""
        held_out = self._evaluate() if self.job.held_out_every else {}
        return outcome(self._exchange(version + 1, Share(held_out=held_out)))

    def _tag(self, step: int, what: str) -> Tag:
        return Tag(self.plan.generation, step, 1, what)

    def _evaluates_at(self, version: int) -> bool:
        every = self.job.held_out_every
        return every > 0 and version > 0 and version % every == 0

    def _evaluate(self) -> Losses:
        """The held-out losses of this rank's part; all ranks make the same number of passes."""
        number = self.job.held_out_micro_batches
        mine = [m for m in range(number) if m % self._ranks == self._rank]
        losses: Losses = {}
        self.engine.train(False)
        with torch.no_grad():
            for turn in turns(mine, number, self._ranks):
                inputs, targets = self.data.held_out(turn.micro_batch)
                total, samples = self.engine.forward(inputs, targets, 0, turn.micro_batch)
                if turn.weight:
                    losses[turn.micro_batch] = (float(total), int(samples))
        self.engine.train(True)
        return losses

    def _accumulate(self, step: int, share: Share) -> None:
        """Forward and backward of all turns; the losses of those that count go into ``share``."""
        began = time.perf_counter()
        announce(self.data, self.plan, self.worker, step)
        for place, turn in enumerate(self._turns):
            micro_batch = turn.micro_batch
            self.endpoint.check()
            reading = time.perf_counter()
            inputs, targets, samples = self._read(step, micro_batch)
            self.seconds.wait_data += time.perf_counter() - reading
            self.fault("forward", step, micro_batch)
            total, number = self.engine.forward(inputs, targets, step, micro_batch)
            if turn.weight:
                share.losses[micro_batch] = (float(total.detach()), int(number))
                if samples:
                    share.samples[micro_batch] = samples
            self.fault("backward", step, micro_batch)
            self.engine.backward(total * (turn.weight / max(int(number), 1)))
            if place + 1 < len(self._turns):
                self.engine.advance(step)
        self.seconds.pipeline = time.perf_counter() - began

    def _read(self, step: int, micro_batch: int) -> tuple[object, object, Samples]:
        if not hasattr(self.data, "inputs"):
            return (*self.data.micro_batch(step, micro_batch), ())
        inputs = read(self.data, Wanted(Side.INPUTS, step, micro_batch))
        targets = read(self.data, Wanted(Side.TARGETS, step, micro_batch))
        return inputs.value, targets.value, inputs.samples

    def _exchange(self, step: int, share: Share) -> list[Share]:
        began, began_ns = time.perf_counter(), time.perf_counter_ns()
        version = step - 1
        tag = Tag(self.plan.generation, version, 1, "backup")
        self.rounds.take_backups(tag, {}, self.store, version, wait=True)
        self.fault("exchange", step, 0)
        share.stop, share.change = self.stop_requested(), self.pending_change()
        for shard in self.rounds.owned:
            state_3N = self.store.get(piece_of(shard), version)
            assert state_3N is not None, f"{shard} is not held in version {version}"
            share.fingerprint += fingerprint(state_3N[0])
        shares = exchange(self.endpoint, self.plan.workers, self._tag(step, "exchange"), share)
        self.seconds.exchange = time.perf_counter() - began
        self.spans.add(EXCHANGE, began_ns)
        return [shares[worker] for worker in self.plan.workers]

    def _snapshot(self, step: int) -> dict[Piece, Tensor]:
        """This rank's state, copied out of the engine as version ``step``."""
        states = {}
        for shard in self.rounds.owned:
            state_3N = self.store.buffer(shard.size)
            assert state_3N.shape[0] == ROWS
            states[piece_of(shard)] = state_3N.zero_()  # padding, and rows that the optimizer does not have
        self.engine.take(self.overlaps, states)
        for piece, state_3N in states.items():
            self.store.put(piece, step, state_3N)
        return states

    def _gather(self, step: int, states: dict[Piece, Tensor]) -> None:
        """Full parameters to every member before a change of plan, in which all make their engines anew."""
        began = time.perf_counter()
        self.stage.hold((0, self.layout.layers))
        self.rounds.gather(self._tag(step, "gather"), self.stage.working, states)
        self.stage.version = dict.fromkeys(self.stage.working, step)
        self.seconds.gather = time.perf_counter() - began
