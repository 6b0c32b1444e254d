"""Runs in which workers die in company, from outside, or while a person stops the run."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from actors.worker import Worker
from runtime.checkpoint import newest_whole
from runtime.events import Event, Recovered, WorkerLost
from runtime.layout import Layout
from runtime.signals import Durable, Lost
from strategies.job import Fault, Job
from strategies.model import build_model
from tests.support.cluster import Killed, LocalRun, Result
from tests.support.models import Tokens

POINTS = (
    "forward", "backward", "reduce", "exchange", "optimizer", "gather", "backup", "recovery", "checkpoint",
)  # fmt: skip


@dataclass
class Trigger:
    """Calls ``action`` once, from a worker that reads micro-batch ``micro_batch`` of step ``step``."""

    step: int
    micro_batch: int
    action: Callable[[], None] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def pull(self, step: int, micro_batch: int) -> None:
        with self._lock:
            action = self.action if (step, micro_batch) == (self.step, self.micro_batch) else None
            if action is not None:
                self.action = None
        if action is not None:
            action()


class TriggeringTokens(Tokens):
    """The same tokens; reading them pulls the trigger."""

    def __init__(self, seed: int, trigger: Trigger, length: int = 5) -> None:
        super().__init__(seed, length=length)
        self._trigger = trigger

    def micro_batch(self, step: int, micro_batch: int) -> Any:
        self._trigger.pull(step, micro_batch)
        return super().micro_batch(step, micro_batch)


@dataclass
class ChaosRun(LocalRun):
    """``together``: groups of workers that die as one when any of them does."""

    together: Collection[frozenset[int]] = ()
    observe: Callable[[Event], None] | None = None
    """Called with every event, in the thread that logs it."""
    born: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        record, observe = self.recorder.event, self.observe

        def recording(event: Event, now: float) -> None:
            record(event, now)
            if observe is not None:
                observe(event)

        self.recorder.event = recording  # type: ignore[method-assign]

    def _inject(self, worker: int, signal: str) -> None:
        self.kill(worker)
        raise Killed

    def kill(self, worker: int) -> None:
        """Ends a worker and its company from any thread."""
        company = self._company(worker)
        for victim in company:
            self.dead.add(victim)
            self.fabric.kill(victim, f"{victim} was killed")
        for victim in company:
            self.host.post(Lost(victim, "process died"))

    def _company(self, worker: int) -> list[int]:
        group = next((group for group in self.together if worker in group), frozenset({worker}))
        return sorted(group)

    def _thread(self, worker: Worker) -> None:
        self.born[worker.worker] = identity(worker)
        super()._thread(worker)

    def assert_survivors_untouched(self, dead: Collection[int]) -> None:
        """Nothing of a survivor was built anew: endpoint, store, stage, modules, parameters."""
        survivors = [worker for number, worker in self.members.items() if number not in dead]
        assert survivors, "a run that ends has a survivor"
        for worker in survivors:
            assert identity(worker) == self.born[worker.worker]


def identity(worker: Worker) -> tuple[int, ...]:
    """Which objects a worker is made of. They outlive the comparison, so ids are not used twice."""
    layers = worker.stage._layers
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    return tuple(map(id, (worker.endpoint, worker.store, worker.stage, worker.data, *layers, *parameters)))


def random_faults(
    rng: random.Random, workers: int, victims: Collection[int], steps: int
) -> tuple[Fault, ...]:
    """One fault for every victim. For "recovery" a worker dies in the recovery from any earlier loss."""
    faults: list[Fault] = []
    for victim in victims:
        step, at = rng.randint(1, steps), rng.choice(POINTS)
        if at == "recovery":
            faults += [Fault(victim, later, at) for later in range(2, steps + 1)]
        elif at in ("forward", "backward"):
            faults.append(Fault(victim, step, at, rng.choice([None, 0, 1, 2, 3, 4])))
        else:
            faults.append(Fault(victim, step, at))
    return tuple(faults)


def layout_of(job: Job) -> Layout:
    return build_model(job.build_model, job.seed).layout


def newest_checkpoint(job: Job) -> tuple[Durable | None, list[str]]:
    """What a resume would begin with, and why newer checkpoints were passed over."""
    manifest, problems = newest_whole(job.checkpoint_root, layout_of(job))
    if manifest is None:
        return None, problems
    return Durable(manifest.version, job.checkpoint_root, manifest.exponents), problems


def resume(job: Job, folder: Path, workers: int, stages: int | Literal["auto"], **changes: Any) -> Result:
    """Goes on from the newest whole checkpoint of ``job``; the steps of this start only."""
    durable, _ = newest_checkpoint(job)
    assert durable is not None, "there is no checkpoint to resume from"
    return ChaosRun(job, folder, workers, stages, start=durable, **changes).run()


def recoveries(result: Result) -> list[Recovered]:
    return [event for event in result.events if isinstance(event, Recovered)]


def losses(result: Result) -> list[WorkerLost]:
    return [event for event in result.events if isinstance(event, WorkerLost)]
