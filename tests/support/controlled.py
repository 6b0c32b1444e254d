"""A controller under test, event by event: no thread, no clock, no message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from runtime.checkpoint import ShardFile
from runtime.control.state import Phase
from runtime.controller import Controller
from runtime.events import (
    StepRecord,
)
from runtime.layout import Block, Layout
from runtime.plan import Member, Plan, Shard, Stage
from runtime.protocol import (
    Held,
    Stepped,
    Written,
)
from runtime.resharding import Holding
from runtime.signals import (
    Durable,
    Joined,
    Note,
    Output,
    Send,
    Terms,
)
from runtime.speeds import Speeds

LAYOUT = Layout(1, (Block(0, "layer 0", (0,), (), 192),), ())
"""One block of three units."""


def choose(generation: int, members: Sequence[Member], speeds: Speeds, previous: Plan | None) -> Plan:
    """One stage; unit u is owned by member u and backed up by the next one, counted in a ring."""
    workers = tuple(member.worker for member in members)
    shards = tuple(
        Shard(0, 64 * u, 64 * u + 64, workers[u % len(workers)], workers[(u + 1) % len(workers)])
        for u in range(3)
    )
    return Plan(
        generation, (Stage(0, 1, workers),), (tuple(workers[m % len(workers)] for m in range(4)),), shards
    )


def holdings(plan: Plan, worker: int, versions: Iterable[int]) -> tuple[Holding, ...]:
    kept = [*plan.owned_by(worker), *plan.backed_up_by(worker)]
    return tuple(Holding(0, shard.start, shard.stop, v) for shard in kept for v in versions)


class Run:
    """A controller and what came out of it last. Time goes by one second an event."""

    def __init__(
        self, workers: int = 3, min_workers: int = 1, start: Durable | None = None, steps: int = 9
    ) -> None:
        self.controller = Controller(Terms("r", LAYOUT, steps, workers, min_workers, start), choose)
        self.now = 0.0
        self.workers = workers

    def tell(self, event: Any) -> list[Output]:
        self.now += 1.0
        return self.controller.handle(event, self.now)

    def join(self, *workers: int) -> list[Output]:
        outputs: list[Output] = []
        for worker in workers:
            outputs += self.tell(Joined(worker, f"node-{worker}", f"at {worker}", [1.0], [2.0]))
        return outputs

    def form(self) -> Run:
        """All joined, under way, nothing done yet."""
        self.join(*range(self.workers))
        assert self.controller.phase is Phase.RUNNING
        return self

    def holds(self, worker: int, *versions: int, plan: Plan | None = None) -> list[Output]:
        """``worker`` reports what it holds under ``plan`` (default: the last one)."""
        plan = plan or self.controller.plan
        assert plan is not None
        held = Held(
            worker,
            self.controller.generation,
            holdings(plan, worker, versions),
            {0: max(versions)},
            {v: (v,) for v in versions},
            dict.fromkeys(versions, 0.5),
        )
        return self.tell(held)

    def step(self, number: int, worker: int = 0, generation: int | None = None) -> list[Output]:
        generation = self.controller.generation if generation is None else generation
        return self.tell(Stepped(worker, record(number, generation)))

    def written(self, worker: int, version: int, start: int, stop: int, generation: int = 1) -> list[Output]:
        file = ShardFile(f"worker-{worker}-g{generation}", "0", 1, ((0, start, stop),))
        return self.tell(Written(worker, generation, version, (7,), file))


def record(step: int, generation: int = 1) -> StepRecord:
    return StepRecord(step, 1.0, 1.0, 0.1, 4, 4, 1.0, 3, generation, 0)


def sent(outputs: Iterable[Output], kind: type[Any]) -> dict[int, Any]:
    return {o.worker: o.command for o in outputs if isinstance(o, Send) and isinstance(o.command, kind)}


def notes(outputs: Iterable[Output], kind: type[Any]) -> list[Any]:
    return [o.event for o in outputs if isinstance(o, Note) and isinstance(o.event, kind)]


def of(outputs: Iterable[Output], kind: type[Any]) -> list[Any]:
    return [o for o in outputs if isinstance(o, kind)]


# --- forming --------------------------------------------------------------------------------
