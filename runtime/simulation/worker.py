"""A simulated worker: the protocol of ``actors.worker.Worker`` with toy state, as generators.

The main thread of the real worker is a generator here that yields wherever the real one waits or computes;
what the real one's other threads do are short actions of its process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol

from runtime.change import at_boundary
from runtime.events import StepRecord
from runtime.fabric.interface import Interrupted, Tag
from runtime.plan import Plan, Shard, WorkerId
from runtime.protocol import (
    Change,
    Entry,
    Exponents,
    Finished,
    Held,
    Interrupt,
    Leave,
    Measured,
    Moved,
    Repeated,
    Resume,
    Settled,
    Stepped,
)
from runtime.resharding import Transfer
from runtime.salvage import layers_of
from runtime.simulation.control import ControlEnd, SimJob
from runtime.simulation.move import SimMover, hand_over
from runtime.simulation.network import Network
from runtime.simulation.pipeline import SimProgress
from runtime.simulation.process import Process, ProcessEnded, Waits
from runtime.simulation.step import Outcome, SimStep
from runtime.simulation.storage import Storage
from runtime.simulation.toy import Reference, ToyStage, ToyStore
from runtime.simulation.writer import Writer

RECORDS_KEPT = 3


class Observer(Protocol):
    """Who checks what simulated workers do, and injects faults where they are."""

    def shared(self, worker: WorkerId, plan: Plan, step: int, attempt: int) -> None: ...

    def batch(self, step: int, micro_batches: tuple[int, ...]) -> None: ...

    def committed(self, worker: WorkerId, plan: Plan, step: int) -> None: ...

    def salvaged(self, worker: WorkerId, micro_batches: int) -> None: ...

    def reached(self, worker: WorkerId, point: str) -> bool:
        """Whether a fault was injected at ``point``."""
        ...


class SimWorker(ControlEnd):
    """One worker. ``speed`` below 1.0 is slow; ``stuck_for`` seconds its next computation lasts longer."""

    def __init__(
        self,
        worker: WorkerId,
        job: SimJob,
        domain: str,
        process: Process,
        network: Network,
        storage: Storage,
        reference: Reference,
        watch: Observer,
    ) -> None:
        super().__init__(worker, job, domain, process, network)
        self.storage, self.reference, self.watch = storage, reference, watch
        self.speed = 1.0
        self.stuck_for = 0.0
        self.stage = ToyStage(job.model.layout)
        self.store = ToyStore(reference)
        self.exponents: dict[int, Exponents] = {}
        self.records: dict[int, StepRecord] = {}
        self.progress = SimProgress(keeps=job.salvage)
        self.left: str | None = None
        self._handed_over: tuple[int, frozenset[Transfer]] = (0, frozenset())
        self._began: dict[int, float] = {}
        self._times: dict[str, list[float]] = {"forward": [], "backward": []}
        self._writer = Writer(self)
        process.start(self._obey())

    def _obey(self) -> Waits[None]:
        while True:
            while not self._commands:
                yield None
            command = self._commands.popleft()
            match command:
                case Leave(reason):
                    self.left = reason
                    self.endpoint.close()
                    return
                case Interrupt(generation):
                    if generation == self.endpoint.acknowledge():
                        self._pending = None
                        yield from self.fault("held")
                        self._tell_held(generation)
                case Resume(plan):
                    yield from self._guarded(plan, partial(self._follow, command))
                case Change(plan):
                    yield from self._guarded(plan, partial(self._enter, command))

    def _tell_held(self, generation: int) -> None:
        now = self.process.clock.now
        self.tell(
            Held(
                self.worker,
                generation,
                self.store.holdings(),
                {block: v for block, v in self.stage.version.items() if v is not None},
                dict(self.exponents),
                {version: now - began for version, began in self._began.items()},
                tuple(self._whole.values()),
                tuple(self.records.values()),
                self.progress.report(),
            )
        )

    def _guarded(self, plan: Plan, follow: Callable[[], Waits[None]]) -> Waits[None]:
        if plan.generation >= self.endpoint.generation:
            self.endpoint.interrupt(plan.generation)
        if self.endpoint.acknowledge() != plan.generation:
            return  # overtaken by a newer change, whose command waits in the queue
        with suppress(Interrupted):
            yield from follow()

    # --- following a plan -------------------------------------------------------------------

    def _follow(self, resume: Resume) -> Waits[None]:
        yield from self.fault("recovery")
        if self.worker not in resume.plan.workers:
            self._plan = None
            yield from self._mover(resume).serve()
            return
        yield from self._train(resume, (yield from self._move(resume)))

    def _enter(self, change: Change) -> Waits[None]:
        tag = Tag(change.plan.generation, 0, 0, "entry")
        self.progress.begin(0, 0, {})  # the sums that it may speak of do not survive other layers
        self.stage.hold(*layers_of(change.plan, self.worker).values())
        entry: Entry = (yield from self.endpoint.receive(change.usher, tag)).note
        yield from self.fault("entry")
        resume = at_boundary(change, entry)
        yield from self._train(resume, (yield from self._move(resume)))

    def _cross(self, change: Change, version: int) -> Waits[Resume | None]:
        generation = change.plan.generation
        self.endpoint.interrupt(generation)
        if self.endpoint.acknowledge() != generation:
            raise Interrupted(self.endpoint.generation)
        yield from self.fault("cross")
        entry = Entry(version, self.exponents[version], self.records.get(version))
        resume = at_boundary(change, entry)
        if self.worker == change.usher:
            assert self._plan is not None
            for newcomer in sorted(set(change.plan.workers) - set(self._plan.workers)):
                self.endpoint.send(newcomer, Tag(generation, 0, 0, "entry"), entry, background=True)
        if self.worker in change.plan.workers:
            return resume
        self._plan = None
        yield from self._mover(resume).serve()
        return None

    def _mover(self, resume: Resume) -> SimMover:
        def settled() -> None:
            self.settled = True
            self.tell(Settled(self.worker, resume.plan.generation))

        generation, sent = self._handed_over
        handed_over = sent if generation == resume.plan.generation else frozenset()
        return SimMover(self, resume, handed_over, settled)

    def hand_over(self, generation: int, version: int, new_values: Mapping[Shard, Sequence[int]]) -> None:
        """Of the step that the change of this generation follows."""
        change = self._pending
        assert change is not None and change.plan.generation == generation, "all have said that they know"
        assert self._plan is not None
        self._handed_over = (generation, hand_over(self, self._plan, change, version, new_values))

    def _move(self, resume: Resume) -> Waits[SimMover]:
        began, plan, version = self.process.clock.now, resume.plan, resume.version
        mover = self._mover(resume)
        self._plan, self._pending, self.settled = plan, None, False
        kept = self.exponents if resume.source == "peers" else {}
        self.exponents = {v: known for v, known in kept.items() if v < version} | {version: resume.exponents}
        salvaged = resume.salvage
        if salvaged is None or self.worker not in salvaged.contributors:
            self.progress.begin(0, 0, {})  # the sums that it speaks of may not survive the move
        yield from mover.move()
        self._version = version
        self._whole = {step: record for step, record in self._whole.items() if step <= version}
        self.records = {} if resume.record is None else {version: resume.record}
        self.tell(Moved(self.worker, plan.generation, self.process.clock.now - began, mover.received))
        return mover

    def _train(self, resume: Resume, mover: SimMover) -> Waits[None]:
        while True:
            plan, version = resume.plan, resume.version
            step = SimStep(self, plan, mover, resume.salvage)
            is_reporter = self.worker in plan.reporters
            stopping = written = False
            change = 0
            while version < resume.stop_at and not stopping and not change:
                self._began = {v: began for v, began in self._began.items() if version - 2 <= v < version}
                self._began[version] = self.process.clock.now
                outcome = yield from step.run(version, is_last=version + 1 == resume.stop_at)
                self._tell_record(version, is_reporter)
                version += 1
                self._version = version
                stopping, change = outcome.stop, outcome.change
                self._tell_measured(version)
                written = self.job.checkpoint_every > 0 and version % self.job.checkpoint_every == 0
                if written:
                    self._writer.write(step, version, is_last=version == resume.stop_at or stopping)
            if not change:
                break
            pending = self._pending
            assert pending is not None and pending.plan.generation == change, "all have said that they know"
            following = yield from self._cross(pending, version)
            if following is None:
                return
            resume, mover = following, (yield from self._move(following))
        self.complete(version, (yield from step.conclude(version)))
        self._tell_record(version, is_reporter)
        if not written:
            self._writer.write(step, version, is_last=True)
        finished = Finished(self.worker, plan.generation, version)
        self._writer.later(0.0, lambda: self.tell_surely(finished))

    def complete(self, step: int, outcome: Outcome) -> None:
        record = self.records.pop(step, None)
        if record is not None:
            self._whole[step] = replace(record, fingerprint=outcome.fingerprint)
            if self._controller_lost_at is None:
                self._whole = {s: r for s, r in self._whole.items() if s > step - RECORDS_KEPT}

    def has_record(self, step: int) -> bool:
        """Whether this worker has the whole record of ``step``."""
        return step in self._whole

    def _tell_record(self, step: int, is_reporter: bool) -> None:
        if is_reporter and step in self._whole:
            self.tell(Stepped(self.worker, self._whole[step]))

    def tell_repeat(self, reporter: WorkerId, step: int, attempt: int) -> None:
        if self.worker == reporter:
            self.tell(Repeated(self.worker, step, attempt))

    def _tell_measured(self, step: int) -> None:
        times, self._times = self._times, {"forward": [], "backward": []}
        whole = times["forward"] and times["backward"]
        layers = [layer for stage in self.stage.held for layer in range(*stage)] if whole else []
        seconds = {what: sum(taken) / len(taken) for what, taken in times.items() if taken}
        self.tell(
            Measured(
                self.worker,
                step,
                {layer: seconds["forward"] for layer in layers},
                {layer: seconds["backward"] for layer in layers},
            )
        )

    # --- computing, writing, faults ---------------------------------------------------------

    def compute(self, first: int, stop: int, what: Literal["forward", "backward"]) -> Waits[None]:
        """Layers ``first`` to ``stop`` - 1; an interrupt shows at the end."""
        seconds = self.job.layer_seconds * (stop - first) * (1 if what == "forward" else 2) / self.speed
        seconds *= self.process.random.uniform(0.98, 1.02)
        self._progress += 1
        self._computing_since = began = self.process.clock.now
        yield seconds
        if self.stuck_for:
            seconds, self.stuck_for = self.stuck_for, 0.0
            yield seconds
        self._times[what].append((self.process.clock.now - began) / (stop - first))
        self._computing_since = None
        self.endpoint.check()

    def fault(self, point: str) -> Waits[None]:
        """A place in the protocol at which something may happen to this worker."""
        if self.watch.reached(self.worker, point):
            if not self.process.alive:
                raise ProcessEnded
            yield 0.0  # stands still here where it was stopped
