"""Every schedule with every sharding gives the bits of one plain process: undisturbed, with a loss, with a
join. ``test_schedules`` has the same cells for ZeRO-1, in more divisions of work."""

from __future__ import annotations

import random
import secrets
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from runtime.events import WorkerJoined, WorkerLeft
from runtime.fabric.sockets import SocketEndpoint
from runtime.plan import Keeping, WorkerId
from runtime.signals import Drain
from strategies.job import Fault
from strategies.options import Offload, Precision
from strategies.schedules.registry import SCHEDULES
from strategies.shardings.registry import DEFAULT, SHARDINGS
from tests.support.chaos import (
    ChaosRun,
    Trigger,
    TriggeringTokens,
    losses,
    newest_checkpoint,
    random_faults,
    recoveries,
)
from tests.support.cluster import Result, toy_job
from tests.support.expected import reference_bits, toy_bits
from tests.support.models import build
from tests.support.ray_jobs import wait_until

STEPS = 4
WORKERS, STAGES = 4, 2
SHARDED: dict[str, dict[str, Any]] = {
    **{name: {"sharding": name} for name in SHARDINGS if name != DEFAULT},
    **{
        f"{name}-offloaded": {"sharding": name, "offload": Offload(1, 1)}
        for name, entry in SHARDINGS.items()
        if entry.keeps.parameters
    },
}
MATRIX = list(product(SCHEDULES, [*(name for name in SHARDINGS if name != DEFAULT), f"{DEFAULT}-offloaded"]))


def assert_same_bits(result: Result, steps: int = STEPS) -> None:
    assert result.outcome == "completed", result.message
    assert [record.step for record in result.steps] == list(range(1, steps + 1))
    assert result.bits == toy_bits(steps)


def run_of(folder: Path, schedule: str, sharding: str, **changes: Any) -> ChaosRun:
    chunks = 2 if SCHEDULES[schedule].chunked else 1
    max_workers = changes.pop("max_workers", None)
    workers, stages = changes.pop("workers", WORKERS), changes.pop("stages", STAGES)
    values = {"steps": STEPS, **SHARDED[sharding], **changes}
    job = toy_job(folder, schedule=schedule, chunks=chunks, **values)
    return ChaosRun(job, folder, workers, stages, max_workers=max_workers)


@pytest.mark.parametrize(("schedule", "sharding"), MATRIX)
def test_undisturbed(tmp_path: Path, schedule: str, sharding: str) -> None:
    assert_same_bits(run_of(tmp_path, schedule, sharding, held_out_every=2, held_out_micro_batches=3).run())


@pytest.mark.parametrize(("schedule", "sharding"), MATRIX)
def test_one_loss(tmp_path: Path, schedule: str, sharding: str) -> None:
    run = run_of(tmp_path, schedule, sharding, faults=(Fault(1, 3, "backward"),))
    result = run.run()
    assert_same_bits(result)
    assert {event.worker for event in losses(result)} == {1} and len(recoveries(result)) == 1
    run.assert_survivors_untouched({1})


@pytest.mark.parametrize(("schedule", "sharding"), MATRIX)
def test_one_join(tmp_path: Path, schedule: str, sharding: str) -> None:
    trigger = Trigger(3, 0)
    data = partial(TriggeringTokens, 5, trigger)
    run = run_of(tmp_path, schedule, sharding, build_data=data, max_workers=WORKERS + 1, steps=STEPS + 2)
    trigger.action = lambda: wait_until(lambda: run.controller.generation >= 2, "a planned change")
    result = run.run()
    assert_same_bits(result, STEPS + 2)
    assert [event.worker for event in result.events if isinstance(event, WorkerJoined)] == [WORKERS]


@pytest.mark.parametrize("at", ["forward", "reduce", "exchange", "optimizer", "gather", "backup"])
@pytest.mark.parametrize("sharding", ["ddp", "zero3"])
def test_a_loss_at_any_point_of_a_step(tmp_path: Path, sharding: str, at: str) -> None:
    """Two workers die one step after the other."""
    faults = (Fault(0, 2, at), Fault(3, 3, at))
    result = run_of(tmp_path, "1f1b", sharding, faults=faults).run()
    assert_same_bits(result)
    assert {event.worker for event in losses(result)} == {0, 3}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("sharding", ["ddp-offloaded", "zero2", "zero3"])
def test_random_losses(tmp_path: Path, sharding: str, seed: int) -> None:
    """One to all but one die at random points, also in the recovery from one another."""
    rng = random.Random(f"{sharding} {seed}")
    victims = rng.sample(range(WORKERS), rng.randint(1, WORKERS - 1))
    faults = random_faults(rng, WORKERS, victims, STEPS)
    run = run_of(tmp_path, rng.choice(list(SCHEDULES)), sharding, faults=faults, checkpoint_every=1)
    assert_same_bits(run.run())
    run.assert_survivors_untouched(run.dead)


@pytest.mark.parametrize("sharding", ["ddp", "zero2", "zero3"])
def test_a_drain(tmp_path: Path, sharding: str) -> None:
    trigger = Trigger(2, 0)
    data = partial(TriggeringTokens, 5, trigger)
    run = run_of(tmp_path, "1f1b", sharding, build_data=data)

    def drain() -> None:
        run.host.post(Drain(2, "maintenance", None))
        wait_until(lambda: run.controller.generation >= 2, "a planned change")

    trigger.action = drain
    result = run.run()
    assert_same_bits(result)
    assert [event.worker for event in result.events if isinstance(event, WorkerLeft)] == [2]
    assert not recoveries(result)


@pytest.mark.parametrize("sharding", ["zero2", "zero3", "zero1-offloaded"])
def test_layers_that_are_computed_again(tmp_path: Path, sharding: str) -> None:
    precision = Precision(recompute=(0, 1, 3))
    run = run_of(tmp_path, "zero-bubble", sharding, workers=3, stages=1, precision=precision)
    assert_same_bits(run.run())


def test_every_sharding_goes_on_from_every_others_checkpoint(tmp_path: Path) -> None:
    """One run, stopped and resumed with another sharding after every other step."""
    start, bits = None, []
    order = ["zero3", "ddp", "zero2", "zero3", "zero2-offloaded", "ddp", "zero1-offloaded"]
    for last, sharding in enumerate(order, start=1):
        run = run_of(tmp_path, "1f1b", sharding, steps=last, workers=3, stages=1 + last % 2)
        run.start = start
        result = run.run()
        assert result.outcome == "completed", result.message
        bits += result.bits
        start, problems = newest_checkpoint(run.job)
        assert start is not None and start.version == last and not problems
    assert bits == toy_bits(len(order))


def test_replicas_take_the_place_of_backups(tmp_path: Path) -> None:
    """Under DDP two workers of three can die at once, shards and backups with them."""
    faults = (Fault(0, 3, "reduce"), Fault(1, 3, "reduce"))
    run = run_of(tmp_path, "1f1b", "ddp", workers=3, stages=1, faults=faults)
    result = run.run()
    assert_same_bits(result)
    assert {event.worker for event in losses(result)} == {0, 1}
    assert all(event.source == "peers" for event in recoveries(result))


def test_nobody_keeps_parameters_under_zero3(tmp_path: Path) -> None:
    run = run_of(tmp_path, "1f1b", "zero3")
    assert_same_bits(run.run())
    assert run.controller.plan is not None and run.controller.plan.keeping is Keeping.NOTHING
    for member in run.members.values():
        assert member.stage.working == {} and member.stage.residence is not None
        assert member.stage.residence.bytes == 0
        assert all(not flat.untyped_storage().nbytes() for flat in member.stage.residence.flats.values())


@pytest.mark.parametrize("reduction", ["fast", "exact"])
def test_ddp_adds_as_zero1_does(tmp_path: Path, reduction: str) -> None:
    """In floating point too, since the shards' owners add in the same order."""
    found = []
    for sharding in ("zero1", "ddp", "ddp-offloaded"):
        changes = {"sharding": "zero1", "reduction": reduction} if sharding == "zero1" else {}
        values = SHARDED.get(sharding, {}) | changes | {"reduction": reduction}
        job = toy_job(tmp_path / sharding, steps=3, **values)
        found.append(ChaosRun(job, tmp_path / sharding, 3, 1).run().bits)
    assert len(found[0]) == 3 and found[0] == found[1] == found[2]


INBOX_BYTES = 1 << 16
"""Far less than a layer's gradients in the runs over sockets."""


class CrampedFabric:
    """Real sockets whose receivers hold back whoever sends more than there is room for."""

    def __init__(self) -> None:
        self.endpoints: dict[WorkerId, SocketEndpoint] = {}
        self._secret = secrets.token_bytes(32)

    def endpoint(self, worker: WorkerId, *, on_control: Any, on_lost: Any) -> SocketEndpoint:
        made = SocketEndpoint(
            worker, self._secret, on_control=on_control, on_lost=on_lost, inbox_limit_bytes=INBOX_BYTES
        )
        self.endpoints[worker] = made
        return made

    def kill(self, worker: WorkerId, reason: str = "died") -> None:
        self.endpoints[worker].close()

    def close(self) -> None:
        for endpoint in list(self.endpoints.values()):
            endpoint.close()


class CrampedRun(ChaosRun):
    def _make_fabric(self) -> Any:
        return CrampedFabric()

    def _worker(self, number: int) -> Any:
        worker = super()._worker(number)
        worker.endpoint.connect({self.host.endpoint.worker: self.host.endpoint.address})
        return worker


@pytest.mark.parametrize("sharding", ["ddp", "zero2", "zero3"])
def test_nobody_waits_for_ever_where_there_is_little_room(tmp_path: Path, sharding: str) -> None:
    """Over real sockets, with layers larger than the inbox, and a loss: who is held back is not stuck."""
    built = partial(build, width=160)
    job = toy_job(
        tmp_path, build_model=built, steps=4, faults=(Fault(2, 3, "backward"),), **SHARDED[sharding]
    )
    run = CrampedRun(job, tmp_path, 4, 2)
    result = run.run()
    assert result.outcome == "completed", result.message
    assert max(block.size for block in run.members[0].layout.blocks) * 4 > INBOX_BYTES
    assert result.bits == reference_bits(4, build_model=built)
    assert [event.lost for event in recoveries(result)] == [(2,)]
