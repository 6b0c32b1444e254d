"""One training step of one worker: pipeline, reduce, exchange, update, gather, back up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from runtime.events import StepRecord
from runtime.exact import (
    clip_coefficient,
    fingerprint,
    mean_gradient,
    squared_norm_fast,
    squared_norms,
)
from runtime.fabric.collectives import exchange
from runtime.fabric.interface import Endpoint, Tag
from runtime.layout import Layout
from runtime.plan import Plan, Strategy, WorkerId
from runtime.protocol import Exponents
from runtime.salvage import Salvage, layers_of
from runtime.samples import count
from runtime.snapshots import Piece, ShardStore
from runtime.spans import BACKUP, EXCHANGE, GATHER, OPTIMIZER, REDUCE, SpanLog
from strategies.job import Job
from strategies.optimizer import Segment, Update, segments, update
from strategies.pipeline import Data, FaultPoint, Pipeline
from strategies.reading import heed
from strategies.salvage import StepProgress
from strategies.schedules.registry import schedule_named
from strategies.shardings.offload import StreamedLayers
from strategies.share import (
    Outcome,
    Share,
    contributions,
    exponents_after,
    gradient_norm,
    largest,
    outcome,
)
from strategies.stage import StageModel
from strategies.zero import piece_of


@dataclass
class StepSeconds:
    """Where the seconds of a step went, as one worker saw it. The waits for peers and data are parts of
    ``pipeline``, that for the last version's copies (``wait_backups``) of ``exchange``; ``backup_lag`` runs
    beside all of them: from a version's end until the copies of it that are kept here have come."""

    pipeline: float = 0.0
    wait_peers: float = 0.0
    wait_data: float = 0.0
    reduce: float = 0.0
    exchange: float = 0.0
    optimizer: float = 0.0
    gather: float = 0.0
    wait_backups: float = 0.0
    backup_lag: float = 0.0


@dataclass(frozen=True, slots=True)
class Summed:
    """What the attempt that fits has found: every worker's share, and this one's part of the sums at the
    scales ``exponents``; ``following`` are the scales for the next step."""

    attempt: int
    shares: list[Share]
    sums: dict[Piece, Tensor]
    exponents: Exponents
    following: Exponents


@dataclass
class StepRunner:
    """Runs steps under one plan. A new plan gets a new runner; what lasts is passed in.

    ``exponents[v]`` are the scales for the step that follows version v.
    """

    job: Job
    layout: Layout
    endpoint: Endpoint
    plan: Plan
    worker: WorkerId
    stage: StageModel
    store: ShardStore
    data: Data
    fault: FaultPoint
    exponents: dict[int, Exponents]
    stop_requested: Callable[[], bool]
    on_repeat: Callable[[int, int], None]
    pending_change: Callable[[], int]
    """The generation of the change of plan that this worker knows of, or 0."""
    hand_over: Callable[[int, int, Mapping[Piece, Tensor]], None]
    """Told of the generation of a change that follows the step, of the step, and of the new state (3, n) of
    what this worker updates, before others' parameters are gathered."""
    settle: Callable[..., None]
    """Takes in what the last move still owes this worker; called before every exchange (``wait=True``) and
    between micro-batches (``wait=False``)."""
    known: Callable[[int, Outcome], None]
    """Told at once, before anything can be interrupted, what an exchange says of the version before it."""
    remember: Callable[[StepRecord], None]
    """Gets a step's record, without fingerprint, before and again after it is committed."""
    progress: StepProgress
    """What has been reached of the step under way, under this plan or an earlier one."""
    salvage: Salvage | None = None
    """What the first step of this plan need not do."""
    spans: SpanLog = field(default_factory=SpanLog)
    """Takes in what is done when."""
    seconds: StepSeconds = field(default_factory=StepSeconds)

    def __post_init__(self) -> None:
        rounds = self.job.sharding_under(self.plan).rounds()
        self.rounds = rounds(self.endpoint, self.plan, self.layout, self.worker)
        self.rounds.join(self.stage, self.store)
        if self.job.offload is not None:
            self.stage.window = StreamedLayers(self.stage, self.job.offload)
        parts = (self.endpoint, self.plan, self.worker, self.stage, self.data)
        strategy = self.plan.strategy or Strategy(self.job.schedule, self.job.chunks)
        schedule = schedule_named(strategy.schedule, strategy.chunks)
        if self.plan.strategy is not None:
            self.stage.recompute = frozenset(strategy.recompute)
        self.pipeline = Pipeline(*parts, schedule, self.fault, self.rounds, spans=self.spans)
        heed(self.data, self.pipeline.check)
        self._exact = self.job.reduction == "exact"
        self._version_ended = 0.0
        self._counts = contributions(self.layout, self.job.micro_batches * self.job.sequence_slices)
        self._segments: dict[Piece, tuple[Segment, ...]] = {
            piece_of(shard): segments(self.layout.blocks[shard.block], shard.start, shard.stop)
            for shard in self.plan.kept_by(self.worker, self.layout)
        }

    def run(self, version: int, *, is_last: bool = False) -> Outcome:
        """Computes step ``version`` + 1 and commits it. The outcome speaks of the step's beginning.

        Where a change of plan follows, the new state's copies are not sent to the old plan's backups: the
        change brings it to the new one's.

        Raises Interrupted when the membership changes, NonFiniteGradient when training diverges.
        """
        step = version + 1
        began = time.perf_counter()
        self.seconds = StepSeconds()
        held_out = self._evaluate(step) if self._evaluates_at(version) else Share()
        summed = self._summed(step, self.exponents[version], held_out)
        result = outcome(summed.shares)
        self.known(version, result)
        norm = gradient_norm(summed.shares, summed.exponents if self._exact else None, result.count)
        record = self._record(step, summed.attempt, result, norm, began)
        # from here on the step may count even if this worker is cut short: others may have committed it
        self.remember(record)
        self.store.drop(before=version)
        new_states = self._update(step, summed, norm, result.count)
        self.exponents[version + 1] = summed.following
        for old in [v for v in self.exponents if v < version]:
            del self.exponents[old]
        if is_last or result.stop or result.change <= self.plan.generation:
            result = replace(result, change=0)
        else:
            self.hand_over(result.change, step, new_states)
        self._gather(step, summed.attempt, new_states)
        self.fault("backup", step, 0)
        if not result.change:
            self.rounds.send_backups(self._tag(step, 0, "backup"), new_states)
            self.rounds.expect_backups()
            self._version_ended = time.perf_counter()
        self.seconds.wait_peers = self.pipeline.waiting.peers + self.rounds.waited
        self.rounds.waited = 0.0
        self.seconds.wait_data = self.pipeline.waiting.data
        self.pipeline.waiting.peers = self.pipeline.waiting.data = 0.0
        self.remember(replace(record, seconds=time.perf_counter() - began, committed_at=time.time()))
        return result

    def _summed(self, step: int, exponents: Exponents, held_out: Share) -> Summed:
        """As many attempts as it takes until no gradient outgrows its scale."""
        attempt = 1
        while True:
            shares, sums = self._attempt(step, attempt, exponents, held_out)
            fits, following = True, None
            if self._exact:
                fits, following = exponents_after(self.layout, largest(shares), exponents, self._counts, step)
            if fits:
                return Summed(attempt, shares, sums, exponents, following)
            attempt += 1
            if exponents is not None:
                self.on_repeat(step, attempt)
            exponents = following

    def _record(self, step: int, attempt: int, result: Outcome, norm: float, began: float) -> StepRecord:
        rows = self.job.micro_batches * self.job.micro_batch_size
        return StepRecord(
            step=step,
            loss=result.loss,
            grad_norm=norm,
            learning_rate=self.job.optimizer.rate(step),
            samples=sum(count(samples) for _, samples in result.read) if result.read else rows,
            tokens=rows * self.job.tokens_per_sample,
            seconds=time.perf_counter() - began,
            workers=len(self.plan.workers),
            generation=self.plan.generation,
            fingerprint=0,
            attempts=attempt,
            committed_at=time.time(),
            read=result.read,
        )

    def conclude(self, version: int) -> Outcome:
        """The exchange after the last step: its fingerprint and the last held-out loss."""
        step = version + 1
        return outcome(self._exchange(step, 1, self._evaluate(step) if self.job.held_out_every else Share()))

    def _tag(self, step: int, attempt: int, what: str) -> Tag:
        return Tag(self.plan.generation, step, attempt, what)

    def _evaluates_at(self, version: int) -> bool:
        every = self.job.held_out_every
        return every > 0 and version > 0 and version % every == 0

    def _evaluate(self, step: int) -> Share:
        """Held-out losses and nothing else."""
        number, paths = self.job.held_out_micro_batches, self.job.paths
        self.rounds.begin(step, 0, sums=False)
        share = Share(held_out=self.pipeline.evaluate(step, 0, number))
        if paths is not None:
            share.half_depth = self.pipeline.evaluate(step, 0, number, paths.half)
        self.rounds.finish()
        self.pipeline.waiting.peers = 0.0  # of training's passes alone
        return share

    def _attempt(
        self, step: int, attempt: int, exponents: Exponents, held_out: Share
    ) -> tuple[list[Share], dict[Piece, Tensor]]:
        probing = self._exact and exponents is None
        began = time.perf_counter()
        salvage = self.salvage if attempt == 1 and self.salvage and self.salvage.step == step else None
        if salvage is None or self.worker not in salvage.contributors:
            self.stage.clear_gradients()
            self.progress.begin(step, attempt, layers_of(self.plan, self.worker))
        self.pipeline.between = partial(self._take_what_came, step - 1)
        self.rounds.begin(step, attempt, sums=not probing)
        losses = self.pipeline.train(self.progress, exponents, salvage)
        share = replace(
            held_out,
            losses=losses,
            samples={m: self.progress.samples[m] for m in losses if self.progress.samples[m]},
            stop=self.stop_requested(),
            change=self.pending_change(),
        )
        self.rounds.finish()
        if self._exact:
            share.maxima_T = self.stage.maxima_T.cpu().numpy()
        self.seconds.pipeline += time.perf_counter() - began
        sums: dict[Piece, Tensor] = {}
        if not probing:
            began = time.perf_counter()
            began_ns = time.perf_counter_ns()
            self.fault("reduce", step, 0)
            tag = self._tag(step, attempt, "reduce")
            sums = self.rounds.reduce(tag, self.stage.summed(), ordered=not self._exact)
            share.squared = self._squared(sums)
            self.seconds.reduce += time.perf_counter() - began
            self.spans.add(REDUCE, began_ns)
        return self._exchange(step, attempt, share), sums

    def _squared(self, sums: dict[Piece, Tensor]) -> dict[int, int | float]:
        squared: dict[int, int | float] = {}
        for piece, sums_N in sums.items():
            cuts = self._segments[piece]
            bounds = [(segment.start, segment.stop) for segment in cuts]
            values: Sequence[int | float]
            if self._exact:
                values = squared_norms(sums_N, bounds)
            else:
                values = [squared_norm_fast(sums_N[start:stop]) for start, stop in bounds]
            for segment, value in zip(cuts, values, strict=True):
                squared[segment.tensor.index] = squared.get(segment.tensor.index, 0) + value
        return squared

    def _exchange(self, step: int, attempt: int, share: Share) -> list[Share]:
        """Every worker's share. Nobody gets it before all copies of the last version are in place."""
        began = time.perf_counter()
        version = step - 1
        began_ns = time.perf_counter_ns()
        self.settle(wait=True)
        waiting = time.perf_counter()
        self._take_backups(version, wait=True)
        self.seconds.wait_backups += time.perf_counter() - waiting
        self.spans.add(BACKUP, began_ns)
        began_ns = time.perf_counter_ns()
        self.fault("exchange", step, 0)
        share.fingerprint = sum(
            fingerprint(self._state(piece_of(shard), version)[0]) for shard in self.rounds.owned
        )
        tag = self._tag(step, attempt, "exchange")
        shares = exchange(self.endpoint, self.plan.workers, tag, share)
        self.seconds.exchange += time.perf_counter() - began
        self.spans.add(EXCHANGE, began_ns)
        return [shares[worker] for worker in self.plan.workers]

    def _take_what_came(self, version: int) -> None:
        self.settle(wait=False)
        self._take_backups(version, wait=False)

    def _take_backups(self, version: int, *, wait: bool) -> None:
        if not self.rounds.awaits_backups:
            return
        tag = self._tag(version, 0, "backup")
        self.rounds.take_backups(tag, self.stage.working, self.store, version, wait=wait)
        if not self.rounds.awaits_backups:
            self.seconds.backup_lag = time.perf_counter() - self._version_ended

    def _state(self, piece: Piece, version: int) -> Tensor:
        state_3N = self.store.get(piece, version)
        assert state_3N is not None, f"{piece} is not held in version {version}"
        return state_3N

    def _update(self, step: int, summed: Summed, norm: float, count: int) -> dict[Piece, Tensor]:
        """The new states (3, n) of what this worker updates. Uses up the sums."""
        began = time.perf_counter()
        began_ns = time.perf_counter_ns()
        self.fault("optimizer", step, 0)
        clip_norm = self.job.optimizer.clip_norm
        clip = clip_coefficient(norm, clip_norm) if clip_norm is not None else 1.0
        gradients: dict[Piece, Tensor] = {}
        sums, exponents = summed.sums, summed.exponents
        for piece in list(sums):  # their memory is given back one by one
            gradients[piece] = self._gradient(piece, sums.pop(piece), exponents, clip / count).cpu()
        gradients = self.rounds.spread(self._tag(step, summed.attempt, "spread"), gradients)
        self.stage.pulse.enter()
        updates = {
            piece: Update(
                self._state(piece, step - 1),
                self.store.buffer(piece[2] - piece[1]),
                gradient_N,
                self._segments[piece],
            )
            for piece, gradient_N in gradients.items()
        }
        update(list(updates.values()), step, self.job.optimizer)
        new_states = {piece: each.new_state for piece, each in updates.items()}
        for piece, new_3N in new_states.items():
            self.store.put(piece, step, new_3N)
        self.stage.pulse.leave()
        self.seconds.optimizer = time.perf_counter() - began
        self.spans.add(OPTIMIZER, began_ns)
        return new_states

    def _gradient(
        self, piece: Piece, sums_N: Tensor, exponents: Sequence[int] | None, multiplier: float
    ) -> Tensor:
        if not self._exact:
            return sums_N * multiplier  # they may be the accumulators themselves
        assert exponents is not None
        gradient_N = sums_N.new_zeros(sums_N.numel(), dtype=torch.float32)
        for segment in self._segments[piece]:
            part = slice(segment.start, segment.stop)
            mean_gradient(sums_N[part], exponents[segment.tensor.index], multiplier, gradient_N[part])
        return gradient_N

    def _gather(self, step: int, attempt: int, new_states: dict[Piece, Tensor]) -> None:
        began = time.perf_counter()
        began_ns = time.perf_counter_ns()
        self.fault("gather", step, 0)
        for block in self.stage.version:
            self.stage.version[block] = None
        self.rounds.gather(self._tag(step, attempt, "gather"), self.stage.working, new_states)
        for block in self.stage.version:
            self.stage.version[block] = step
        if self.stage.window is not None:
            self.stage.window.renew()
        self.seconds.gather = time.perf_counter() - began
        self.spans.add(GATHER, began_ns)
