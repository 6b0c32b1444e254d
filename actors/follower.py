"""How a worker follows its plan: moves to it, trains step after step, and goes over to the next one.

Everything here runs in the worker's own thread; ``stop`` and ``is_told`` are for the control channel's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, Protocol

from torch import Tensor

from actors.line import Line
from actors.room import Room
from actors.shard_writer import ShardWriter
from actors.step_records import StepRecords
from runtime.change import at_boundary
from runtime.fabric.interface import (
    Endpoint,
    Interrupted,
    Tag,
)
from runtime.plan import Keeping, Plan, WorkerId
from runtime.protocol import (
    Change,
    Entry,
    Exponents,
    Held,
    Measured,
    Moved,
    Repeated,
    Resume,
    Settled,
)
from runtime.resharding import Transfer
from runtime.salvage import layers_of
from runtime.snapshots import Piece, ShardStore
from runtime.spans import RECOVERY, SpanLog
from strategies.job import Job
from strategies.move import Mover, Working, hand_over
from strategies.pipeline import Data, FaultPoint
from strategies.salvage import StepProgress
from strategies.share import Outcome
from strategies.stage import StageModel
from strategies.step import StepRunner, StepSeconds
from strategies.zero import ZeroRounds


class Runner(Protocol):
    """Makes the steps of one plan (``strategies.step.StepRunner``, or an engine's)."""

    rounds: ZeroRounds
    seconds: StepSeconds

    def run(self, version: int, *, is_last: bool = False) -> Outcome:
        """Computes step ``version`` + 1 and commits it."""
        ...

    def conclude(self, version: int) -> Outcome:
        """The exchange after the last step."""
        ...


class Follower:
    """What a worker knows of its run. ``follow`` and ``enter`` return at the run's end or where there is no
    work here any more; they raise Interrupted when something has come in between.

    ``build_lock`` is held while a model is built from its seed; ``fault`` is called at the places where a
    fault may be injected. ``step_flops`` and ``peak_flops`` are passed on (``Measured``).
    """

    def __init__(
        self,
        worker: WorkerId,
        job: Job,
        line: Line,
        stage: Working,
        store: ShardStore,
        data: Data,
        *,
        fault: FaultPoint,
        build_lock: AbstractContextManager[Any],
        step_flops: int | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self.worker = worker
        self.job = job
        self.layout = stage.layout
        self.stage: Working = stage
        self.store = store
        self.data = data
        self.plan: Plan | None = None
        self.version = 0
        self.stop = False
        self.settled = True
        self.records = StepRecords(worker, line)
        self.writer = ShardWriter(worker, job.checkpoint_root, line, fault)
        self._line = line
        self._tell = line.tell
        self._fault = fault
        self._build_lock = build_lock
        self._step_flops, self._peak_flops = step_flops, peak_flops
        self._pending: Change | None = None
        self._room: Room | None = None  # for the pending change
        self._handed_over: tuple[int, frozenset[Transfer]] = (0, frozenset())  # for which generation
        self._began: dict[int, float] = {}
        self._spans = SpanLog()
        self._left_ns: int | None = None  # since when no step has been under way here
        self._exponents: dict[int, Exponents] = {}
        self._progress = StepProgress()

    @property
    def endpoint(self) -> Endpoint:
        return self._line.endpoint

    def is_told(self, change: Change) -> bool:
        """Takes note of a change that is to come; False for a worker that has no work yet."""
        if self.plan is None or self.worker not in self.plan.workers:
            return False
        self._pending = change
        if isinstance(self.stage, StageModel) and self.worker in change.plan.workers:
            self._take_room()
            self._room = Room(self.stage, change.plan, self.worker)
        return True

    def _take_room(self) -> Room | None:
        """What was made ready for a change; whether it is the one at hand is for the caller to see."""
        room, self._room = self._room, None
        if room is not None:
            room.close()
        return room

    def follow(self, resume: Resume) -> None:
        """Goes on under another plan, or serves what others need of this worker."""
        plan, version = resume.plan, resume.version
        self._leave_step()
        self._fault("recovery", version + 1, 0)
        if self.worker not in plan.workers:
            self.plan = None
            self._connect(resume.addresses)
            self._mover(resume).serve()
            self._left_ns = None
            return
        self._train(resume, self._move(resume))

    def enter(self, change: Change) -> None:
        """Comes in where those at work say that the change takes place."""
        self._left_ns = time.perf_counter_ns()
        self._connect(change.addresses)
        resume = at_boundary(change, self._entry(change))
        self._train(resume, self._move(resume))

    def _entry(self, change: Change) -> Entry:
        """Where this worker comes in. Until it is told, it makes room for what it will hold: memory that is
        written to for the first time comes slowly, and later the others would stand still for that."""
        tag = Tag(change.plan.generation, 0, 0, "entry")
        self._progress.begin(0, 0, {})  # the sums that it may speak of do not survive other layers
        keeps = self.job.keeps_under(change.plan)
        self.stage.hold(*layers_of(change.plan, self.worker).values(), keeps=keeps)
        fresh = [block for block, version in self.stage.version.items() if version is None]
        homes = (self.stage.working, self.stage.accumulators)
        room = [home[block] for home in homes for block in fresh if block in home]
        room += self.store.prepare([shard.size for shard in change.plan.kept_by(self.worker, self.layout)])
        for memory in room:
            if (message := self.endpoint.poll_any([tag])) is not None:
                break
            memory.zero_()
        else:
            message = self.endpoint.receive(change.usher, tag)
        entry: Entry = message.note
        return entry

    def _cross(self, change: Change, version: int) -> Resume | None:
        """At the boundary after ``version`` steps: what to go on with, or None for who has no work any more.

        Raises Interrupted if something else has come first.
        """
        generation = change.plan.generation
        self._leave_step()
        self._connect(change.addresses)
        self.endpoint.interrupt(generation)
        if self.endpoint.acknowledge() != generation:
            raise Interrupted(self.endpoint.generation)
        entry = Entry(version, self._exponents[version], self.records.unfinished_of(version))
        resume = at_boundary(change, entry)
        if self.worker == change.usher:
            assert self.plan is not None
            for newcomer in sorted(set(change.plan.workers) - set(self.plan.workers)):
                # ahead of parameters, on the link that these take: nobody waits here until that is made
                self.endpoint.send(newcomer, Tag(generation, 0, 0, "entry"), note=entry, background=True)
        if self.worker in change.plan.workers:
            return resume
        self.plan = self._left_ns = None
        self._mover(resume).serve()
        return None

    def _hand_over(self, generation: int, version: int, new_states: Mapping[Piece, Tensor]) -> None:
        """Of the step that the change of this generation follows."""
        change = self._pending
        assert change is not None and change.plan.generation == generation, "all have said that they know"
        self._connect(change.addresses)
        assert self.plan is not None
        sent = hand_over(self.endpoint, self.worker, self.plan, change, version, new_states)
        self._handed_over = (generation, sent)

    def _connect(self, addresses: Mapping[WorkerId, str]) -> None:
        self.endpoint.connect({w: a for w, a in addresses.items() if w != self.worker})

    def _leave_step(self) -> None:
        if self._left_ns is None:
            self._left_ns = time.perf_counter_ns()

    def _mover(self, resume: Resume) -> Mover:
        def settled() -> None:
            self.settled = True
            self._tell(Settled(self.worker, resume.plan.generation))

        generation, sent = self._handed_over
        handed_over = sent if generation == resume.plan.generation else frozenset()
        parts = (self.job, self.layout, self.endpoint, self.worker, self.stage, self.store)
        return Mover(*parts, resume, handed_over, on_settled=settled)

    def _move(self, resume: Resume) -> Mover:
        began = time.perf_counter()
        plan, version = resume.plan, resume.version
        self._connect(resume.addresses)
        mover = self._mover(resume)
        self.plan, self._pending, self.settled = plan, None, False
        # Known before anything is held at this version: a further loss may cut the move short. Those of the
        # version before are kept, which a loss before everything has been copied goes back to.
        kept = {v: e for v, e in self._exponents.items() if v < version} if resume.source == "peers" else {}
        self._exponents = {**kept, version: resume.exponents}
        self._progress.keeps = self.job.salvages_under(plan)
        salvaged = resume.salvage
        if salvaged is None or self.worker not in salvaged.contributors:
            self._progress.begin(0, 0, {})  # the sums that it speaks of may not survive the move
        room = self._take_room()
        if room is not None and room.generation == plan.generation and isinstance(self.stage, StageModel):
            room.give(self.stage)
        with self._build_lock if resume.source == "initial" else nullcontext():
            mover.move()
        self._prepare(resume, mover)
        self.version = version
        self.records.follow(plan, version, resume.record)
        assert self._left_ns is not None, "nobody moves in mid-step"
        self._spans.add(RECOVERY, self._left_ns)
        self._left_ns = None
        self._tell(Moved(self.worker, plan.generation, time.perf_counter() - began, mover.bytes_received))
        return mover

    def _prepare(self, resume: Resume, mover: Mover) -> None:
        """What else is needed before steps are made under another plan: the owners' state, where layers take
        their parameters from it."""
        if resume.plan.keeping is Keeping.NOTHING:
            mover.settle(wait=True)

    def _runner(self, resume: Resume, mover: Mover) -> Runner:
        plan = resume.plan
        assert isinstance(self.stage, StageModel)
        return StepRunner(
            job=self.job,
            layout=self.layout,
            endpoint=self.endpoint,
            plan=plan,
            worker=self.worker,
            stage=self.stage,
            store=self.store,
            data=self.data,
            fault=self._fault,
            exponents=self._exponents,
            stop_requested=lambda: self.stop,
            on_repeat=lambda step, attempt: self._tell_repeat(plan.workers[0], step, attempt),
            pending_change=self.pending_generation,
            hand_over=self._hand_over,
            settle=mover.settle,
            known=self.records.complete,
            remember=self.records.remember,
            progress=self._progress,
            salvage=resume.salvage,
            spans=self._spans,
        )

    def pending_generation(self) -> int:
        pending = self._pending
        return 0 if pending is None else pending.plan.generation

    def _train(self, resume: Resume, mover: Mover) -> None:
        """Step after step, through changes of plan, until the run's end or until there is no work here."""
        while True:
            plan, version = resume.plan, resume.version
            runner = self._runner(resume, mover)
            stopping = written = False
            change = 0
            while version < resume.stop_at and not stopping and not change:
                self._began = {v: began for v, began in self._began.items() if version - 2 <= v < version}
                self._began[version] = time.perf_counter()
                outcome = runner.run(version, is_last=version + 1 == resume.stop_at)
                self.records.tell(version)
                version += 1
                self.version = version
                stopping, change = outcome.stop, outcome.change
                self._tell_measured(version, runner)
                self._tell(self._spans.take(self.worker, version, plan.generation))
                written = self.job.checkpoint_every > 0 and version % self.job.checkpoint_every == 0
                if written:
                    self._write(runner, version, is_last=version == resume.stop_at or stopping)
            if not change:
                break
            pending = self._pending
            assert pending is not None and pending.plan.generation == change, "all have said that they know"
            following = self._cross(pending, version)
            if following is None:
                return
            resume, mover = following, self._move(following)
        self.records.complete(version, runner.conclude(version))
        self.records.tell(version)
        if not written:
            self._write(runner, version, is_last=True)
        self.writer.finish(plan.generation, version)

    def _tell_repeat(self, reporter: WorkerId, step: int, attempt: int) -> None:
        if self.worker == reporter:
            self._tell(Repeated(self.worker, step, attempt))

    def _tell_measured(self, step: int, runner: Runner) -> None:
        times = self.stage.take_times()
        counts = times.micro_batches
        fabric = self.endpoint.statistics()
        self._tell(
            Measured(
                self.worker,
                step,
                {layer: seconds / counts[layer] for layer, seconds in times.forward.items()},
                {layer: seconds / counts[layer] for layer, seconds in times.backward.items()},
                asdict(runner.seconds),
                self._resident_bytes(runner, fabric["inbox_peak_bytes"]),
                {"sent": fabric["bytes_sent"], "received": fabric["bytes_received"]},
                self._step_flops,
                self._peak_flops,
            )
        )

    def _resident_bytes(self, runner: Runner, inbox_peak: int) -> dict[str, int]:
        residence = self.stage.residence
        parameters = sum(tensor.nbytes for tensor in self.stage.working.values())
        accumulators = sum(tensor.nbytes for tensor in self.stage.accumulators.values())
        return {
            "parameters": parameters + (0 if residence is None else residence.take_peak()),
            "accumulators": accumulators + runner.rounds.sums_bytes,
            "shards": self.store.bytes(),
            "inbox_peak": inbox_peak,
        }

    def _write(self, runner: Runner, version: int, *, is_last: bool) -> None:
        self.writer.write(runner.rounds, self.store, version, self._exponents[version], is_last=is_last)

    def held(self, generation: int) -> Held:
        """What this worker holds, in answer to an interrupt. A change that was pending is off."""
        self._pending = None
        self._take_room()
        self._leave_step()
        now = time.perf_counter()
        ages = {version: now - began for version, began in self._began.items()}
        working = {block: v for block, v in self.stage.version.items() if v is not None}
        return Held(
            self.worker,
            generation,
            self.store.holdings(),
            working,
            dict(self._exponents),
            ages,
            self.records.whole,
            self.records.unfinished,
            self._progress.report(),
        )
