"""A worker whose steps are computed by a DeepSpeed engine. Plans, moves, records and backups are Reknit's
own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from actors.engines.engine import Engine, Overlap, grouped_parameters, overlaps, state_of
from actors.engines.group import Group, prepare_deepspeed
from actors.engines.held import HostParameters
from actors.engines.module import StepModule
from actors.engines.runner import EngineRunner
from actors.follower import Follower
from actors.line import Line
from actors.worker import Worker
from runtime.fabric.interface import EndpointClosed, Interrupted, Message, Tag
from runtime.plan import WorkerId
from runtime.protocol import Change, Interrupt, Leave, Resume
from runtime.pulse import Pulse
from runtime.snapshots import ROWS, ShardStore
from strategies.engine import EngineSettings, rounds
from strategies.job import Job
from strategies.model import Model
from strategies.move import Mover
from strategies.pipeline import Data, FaultPoint
from strategies.zero import ZeroRounds, piece_of

LOSS_SECONDS = 20.0
"""How long after a collective has failed the controller may take to say who was lost. Only then it counts as
a failure of the run itself."""


class EngineFollower(Follower):
    """Makes a group and an engine for every plan; the model's modules are the same all the time."""

    stage: HostParameters

    def __init__(
        self,
        worker: WorkerId,
        job: Job,
        line: Line,
        model: Model,
        store: ShardStore,
        data: Data,
        device: torch.device,
        *,
        fault: FaultPoint,
        build_lock: AbstractContextManager[Any],
        pulse: Pulse,
    ) -> None:
        assert job.engine is not None
        self._settings: EngineSettings = job.engine
        self.group = Group(device)
        self._module = StepModule(model, job.seed, device)
        self._engine: Engine | None = None
        self._overlaps: list[Overlap] = []
        stage = HostParameters(model.layout, pulse)
        super().__init__(worker, job, line, stage, store, data, fault=fault, build_lock=build_lock)
        self._warm_up()

    def _warm_up(self) -> None:
        """Imports and compiles what an engine needs, by making one around a small module."""
        prepare_deepspeed()
        self.group.form_alone()
        small = nn.Linear(8, 8)
        group = {"params": list(small.parameters()), "weight_decay": 0.0}
        try:
            engine = Engine(small, [group], self._settings, self.job.optimizer, micro_batch_size=1, passes=1)
            engine.close()
        finally:
            self.group.leave()

    def follow(self, resume: Resume) -> None:
        with self._interruptible(resume.plan.generation):
            super().follow(resume)

    def enter(self, change: Change) -> None:
        with self._interruptible(change.plan.generation):
            super().enter(change)

    @contextmanager
    def _interruptible(self, generation: int) -> Iterator[None]:
        """What a collective raises when a peer is gone comes before word of the loss: waits for that."""
        try:
            yield
        except (Interrupted, EndpointClosed, ValueError):
            raise
        except Exception:
            if self.group.wait_until_abandoned(LOSS_SECONDS):
                raise Interrupted(self.endpoint.generation) from None
            raise
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self.group.leave()

    def _prepare(self, resume: Resume, mover: Mover) -> None:
        """The group and the engine of the new plan, with the state of its version."""
        self.group.begin()
        self.endpoint.check()
        mover.settle(wait=True)
        self._let_go()
        members = resume.plan.workers
        self.group.form(self.endpoint, resume.plan.generation, members)
        self.endpoint.check()  # an interrupt may have come before there was anything to abandon
        # a large model's parameters take long to be moved; where it waits for others, a loss ends that
        with self.stage.pulse.long():
            self._module.reclaim(self.stage.working)
            self._engine = engine = Engine(
                self._module,
                grouped_parameters(self._module, self._settings, self.job.optimizer),
                self._settings,
                self.job.optimizer,
                micro_batch_size=self.job.micro_batch_size,
                passes=rounds(self.job.micro_batches, len(members)),
            )
        held = engine.fragments(self._module.tensors, members.index(self.worker))
        owned = [piece_of(shard) for shard in resume.plan.owned_by(self.worker)]
        self._overlaps = overlaps(self.layout, owned, held)
        source = self._whole_state(resume) if self._settings.stage == 0 else self.store
        with self.stage.pulse.long():
            for fragment in held:
                engine.put(fragment, state_of(self.layout, source, resume.version, fragment))
        engine.count(resume.exponents, resume.version)
        self.stage.release()

    def _whole_state(self, resume: Resume) -> ShardStore:
        """All state from its owners: without ZeRO every rank has all of it."""
        plan = resume.plan
        gathering = ZeroRounds(self.endpoint, plan, self.layout, self.worker)
        whole = {block.index: torch.zeros(ROWS, block.size) for block in self.layout.blocks}
        mine: dict[Any, Tensor] = {}
        for shard in gathering.owned:
            state_3N = self.store.get(piece_of(shard), resume.version)
            assert state_3N is not None, f"{shard} is not held in version {resume.version}"
            mine[piece_of(shard)] = state_3N
        for row in range(ROWS):
            tag = Tag(plan.generation, resume.version, row, "whole state")
            rows = {block: state_3N[row] for block, state_3N in whole.items()}
            gathering.gather(tag, rows, {piece: state_3N[row:] for piece, state_3N in mine.items()})
        source = ShardStore()
        for block in self.layout.blocks:
            source.put((block.index, 0, block.size), resume.version, whole[block.index])
        return source

    def _runner(self, resume: Resume, mover: Mover) -> EngineRunner:
        assert self._engine is not None
        return EngineRunner(
            job=self.job,
            layout=self.layout,
            endpoint=self.endpoint,
            plan=resume.plan,
            worker=self.worker,
            stage=self.stage,
            store=self.store,
            data=self.data,
            fault=self._fault,
            exponents=self._exponents,
            stop_requested=lambda: self.stop,
            pending_change=self.pending_generation,
            known=self.records.complete,
            remember=self.records.remember,
            engine=self._engine,
            overlaps=self._overlaps,
            spans=self._spans,
        )


class EngineWorker(Worker):
    """As ``Worker``; an interrupt also ends the collectives that this worker waits in."""

    follower: EngineFollower

    def _make_follower(
        self, model: Model, device: torch.device, lock: AbstractContextManager[Any]
    ) -> EngineFollower:
        return EngineFollower(
            self.worker,
            self.job,
            self._line,
            model,
            self.store,
            self.data,
            device,
            fault=self._fault,
            build_lock=lock,
            pulse=self.pulse,
        )

    def _on_control(self, message: Message) -> None:
        super()._on_control(message)
        # after the endpoint knows: who leaves a collective finds there why
        if isinstance(message.note, Interrupt | Leave):
            self.follower.group.abandon()
