"""A run on real Ray under a test's eyes: its events, its steps, and its bits beside a plain process's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from actors.cluster import RayRun, gcs_address
from actors.local_cluster import SLOT
from jobs.assembly import assemble, optimizer_settings, run_settings
from jobs.recipe.recipe import Recipe
from jobs.reference import Reference
from runtime.plan import Plan, WorkerId
from runtime.run_folder import RunFolder
from tests.support.expected import Bits
from tests.support.models import Tokens, build
from tests.support.ray_jobs import PACED, toy_recipe, wait_until

WORKERS = 3
NODES = 4
FOR_EVER = 1_000_000
"""Steps of a run that is stopped when the test has seen enough."""


def recipe_of(
    name: str,
    steps: int = FOR_EVER,
    *,
    workers: int = WORKERS,
    resources: float = 1.0,
    **sections: Any,
) -> Recipe:
    return toy_recipe(
        name,
        steps,
        workers,
        2,
        data=PACED,
        parallel={
            "workers": workers,
            "max_workers": workers,
            "stages": "auto",
            "micro_batches": 5,
            "micro_batch_size": 2,
            "cpus_per_worker": 0.1,
            "resources": {SLOT: resources},
        },
        **{"detection": {"silence_seconds": 2.0, "stuck_seconds": 20.0}, **sections},
    )


@dataclass
class Expected:
    """The plain reference's bits, computed as far as they are asked for."""

    recipe: Recipe
    _bits: Bits = field(default_factory=list)
    _reference: Reference | None = None

    def first(self, steps: int) -> Bits:
        if self._reference is None:
            torch.manual_seed(self.recipe.run.seed)
            layers, loss = build()
            settings = optimizer_settings(self.recipe)
            data = Tokens(5).micro_batch
            self._reference = Reference(layers, loss, data, seed=7, micro_batches=5, settings=settings)
        while len(self._bits) < steps:
            step = self._reference.step()
            self._bits.append((step.loss, step.grad_norm, step.fingerprint))
        return self._bits[:steps]


@dataclass
class Watched:
    """A run, as a test sees it."""

    run: RayRun
    folder: RunFolder
    expected: Expected

    def steps(self) -> int:
        return self.run.progress(FOR_EVER, FOR_EVER).steps_total

    def events(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.run.progress(FOR_EVER, 0).events if isinstance(event, kind)]

    def plan(self) -> Plan:
        plan = self.run.plan()
        assert plan is not None
        return plan

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
        """Waits for ``condition`` while the run goes on."""

        def true_or_over() -> Any:
            progress = self.run.progress(FOR_EVER, FOR_EVER)
            assert progress.outcome is None, f"waiting for {what}: {progress.message}"
            return condition()

        return wait_until(true_or_over, what, seconds)

    def full(self) -> tuple[WorkerId, ...]:
        """The members once there are as many as there should be and nothing is under way."""

        def all_there() -> tuple[WorkerId, ...]:
            plan = self.run.plan()
            processes = self.run.processes()
            whole = plan is not None and len(plan.workers) == WORKERS and set(plan.workers) <= set(processes)
            return plan.workers if plan is not None and whole else ()

        found: tuple[WorkerId, ...] = self.until(all_there, "a full membership")
        return found

    def replaced(self, *gone: WorkerId) -> None:
        """Waits until there are as many as before without those who are gone, and a few steps more."""

        def without_them() -> bool:
            plan = self.run.plan()  # none while a controller takes over
            return plan is not None and len(plan.workers) == WORKERS and not set(gone) & set(plan.workers)

        self.until(without_them, f"{gone} are replaced")
        self.goes_on()

    def goes_on(self, steps: int = 3) -> None:
        reached = self.steps() + steps
        self.until(lambda: self.steps() >= reached, f"step {reached}")

    def kill(self, worker: WorkerId, number: signal.Signals = signal.SIGKILL) -> int:
        process = self.run.processes()[worker]
        os.kill(process, number)
        return process

    def heard(self, kind: type[Any], worker: WorkerId) -> Any:
        """The event of ``kind`` about ``worker``, once it is there."""
        return self.until(
            lambda: next((event for event in self.events(kind) if event.worker == worker), None),
            f"{kind.__name__} of worker {worker}",
        )

    def assert_same_bits(self) -> None:
        steps = self.run.progress(0, FOR_EVER).steps
        assert [step.step for step in steps] == list(range(1, len(steps) + 1))
        assert [(s.loss, s.grad_norm, s.fingerprint) for s in steps] == self.expected.first(len(steps))
        assert all(step.samples == 10 for step in steps)


def start(folder: Path, recipe: Recipe) -> RayRun:
    created = RunFolder.create(folder, recipe.to_toml(), {})
    settings = run_settings(recipe, folder)
    created.note_controller(address=gcs_address(), name=settings.name)
    return RayRun(assemble(recipe, str(folder / "checkpoints")), settings)
