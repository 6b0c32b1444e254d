"""In which order a worker hands over what others need of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from runtime.fabric.inprocess import InProcessEndpoint, InProcessFabric
from runtime.fabric.interface import Tag
from runtime.layout import Layout
from runtime.plan import Plan, Stage, WorkerId
from runtime.protocol import Change, Resume
from runtime.resharding import Transfer
from runtime.snapshots import ShardStore
from strategies.job import Job
from strategies.model import build_model
from strategies.move import Mover, Working, hand_over
from strategies.options import Precision
from strategies.stage import StageModel
from tests.support.cluster import toy_job

GENERATION, VERSION, SIZE = 3, 7, 128
PARAMETERS = Tag(GENERATION, VERSION, 0, "move parameters")
STATE = Tag(GENERATION, VERSION, 0, "move state")
ASKS = Tag(GENERATION, VERSION, 0, "move asks")


@pytest.fixture
def endpoints() -> Iterator[list[InProcessEndpoint]]:
    fabric = InProcessFabric()
    made = [fabric.endpoint(worker, on_control=None, on_lost=None) for worker in range(3)]
    for endpoint in made:
        endpoint.interrupt(GENERATION)
        endpoint.acknowledge()
    yield made
    fabric.close()


def source(endpoint: InProcessEndpoint, transfers: tuple[Transfer, ...]) -> Mover:
    """A worker that holds the state of blocks 0 to 3, in which every element of a row is 10 times its block
    plus the row."""
    store = ShardStore()
    for block in range(4):
        rows_3 = 10.0 * block + torch.arange(3.0)
        store.put((block, 0, SIZE), VERSION, rows_3[:, None].repeat(1, SIZE))
    resume = Resume(Plan(GENERATION, (), (), ()), VERSION, "peers", {}, transfers, None, stop_at=9)
    stage = SimpleNamespace(version={}, working={})
    return Mover(
        cast(Job, None), cast(Layout, None), endpoint, endpoint.worker, cast(Working, stage), store, resume
    )


def parameters(target: WorkerId, *blocks: int) -> tuple[Transfer, ...]:
    return tuple(Transfer(0, target, block, 0, SIZE, "parameters") for block in blocks)


def moments(target: WorkerId, *blocks: int) -> tuple[Transfer, ...]:
    return tuple(Transfer(0, target, block, 0, SIZE, "moments") for block in blocks)


def test_state_waits_until_it_is_asked_for(endpoints: list[InProcessEndpoint]) -> None:
    me, first, second = endpoints
    mover = source(me, (*moments(1, 0, 1), *moments(2, 2), *parameters(1, 3)))
    mover._begin_sending()
    assert first.receive(0, PARAMETERS._replace(index=(3, 0, SIZE))).tensors[0].tolist() == [30.0] * SIZE
    mover.settle(wait=False)
    assert first.poll_any([STATE]) is None
    first.send(0, ASKS)
    mover.settle(wait=False)  # a piece at a time
    came = first.receive_any([STATE])
    assert came.tag.index == (0, 0, SIZE)
    assert came.tensors[0][:, 0].tolist() == [1.0, 2.0]
    second.send(0, ASKS)
    settled: list[bool] = []
    mover.on_settled = lambda: settled.append(True)
    mover.settle(wait=True)
    assert first.receive_any([STATE]).tag.index == (1, 0, SIZE)
    assert second.receive_any([STATE]).tag.index == (2, 0, SIZE)
    assert settled == [True]


def test_state_is_taken_in_while_others_have_not_asked_yet(endpoints: list[InProcessEndpoint]) -> None:
    me, first, second = endpoints
    mover = source(me, moments(1, 0))
    mover._owed = {(2, (3, 0, SIZE)): moments(0, 3)[0]}
    mover._begin_sending()
    second.send(0, STATE._replace(index=(3, 0, SIZE)), [torch.zeros(2, SIZE)])
    mover.settle(wait=False)
    assert mover._owed == {}
    assert first.poll_any([STATE]) is None
    first.send(0, ASKS)
    mover.settle(wait=True)
    assert first.receive_any([STATE]).tag.index == (0, 0, SIZE)


def test_who_needs_the_fewest_parameters_gets_them_first(endpoints: list[InProcessEndpoint]) -> None:
    me = endpoints[0]
    sent: list[tuple[WorkerId, object]] = []
    transfers = (*parameters(1, 0, 1), *parameters(2, 2), *moments(2, 0, 1, 3))
    mover = source(me, transfers)
    me.send = lambda to, tag, *_, **__: sent.append((to, tag.index))  # type: ignore[method-assign]
    mover._begin_sending()
    assert sent == [(2, (2, 0, SIZE)), (1, (0, 0, SIZE)), (1, (1, 0, SIZE))]


def test_parameters_go_to_those_at_work_before_they_are_gathered(endpoints: list[InProcessEndpoint]) -> None:
    me, at_work, newcomer = endpoints
    half = SIZE // 2
    transfers = (
        Transfer(0, 1, 0, half, SIZE, "parameters"),
        Transfer(0, 1, 1, 0, SIZE, "parameters"),  # a half of it is another owner's, and gathered first
        *parameters(2, 0),
        *moments(1, 0),
        Transfer(1, 2, 0, 0, half, "parameters"),
    )
    old = Plan(GENERATION - 1, (Stage(0, 2, (0, 1)),), (), ())
    change = Change(Plan(GENERATION, (), (), ()), {}, transfers, stop_at=9, usher=0)
    state_3N = torch.arange(3.0 * SIZE).view(3, SIZE)
    states = {(0, 0, SIZE): state_3N, (1, 0, half): state_3N[:, :half]}
    sent = hand_over(me, 0, old, change, VERSION, states)
    assert sent == {transfers[0]}
    came = at_work.receive(0, PARAMETERS._replace(index=(0, half, SIZE)))
    assert came.tensors[0].tolist() == list(range(half, SIZE))

    mover = source(me, transfers)
    mover.handed_over = sent
    mover._begin_sending()
    for target, block in ((at_work, 1), (newcomer, 0)):
        message = target.receive(0, PARAMETERS._replace(index=(block, 0, SIZE)))
        assert message.tensors[0].tolist() == [10.0 * block] * SIZE
    assert at_work.poll_any([PARAMETERS]) is None, "nothing is sent twice"


def test_heartbeats_tell_that_a_model_is_being_built(
    endpoints: list[InProcessEndpoint], tmp_path: Path
) -> None:
    job = toy_job(tmp_path)
    model = build_model(job.build_model, job.seed)
    seen: list[float] = []

    def built() -> Any:
        seen.append(stage.pulse.computing())
        return job.build_model()

    stage = StageModel(model, seed=7, precision=Precision(), device=torch.device("cpu"), exact=True)
    plan = Plan(GENERATION, (Stage(0, len(model.layers), (0,)),), ((0,),), ())
    resume = Resume(plan, 0, "initial", {}, (), None, stop_at=9)
    slow = replace(job, build_model=built)
    Mover(slow, model.layout, endpoints[0], 0, stage, ShardStore(), resume).move()
    assert len(seen) == 1 and seen[0] > 0.0
    assert stage.pulse.computing() == 0.0
    assert set(stage.version.values()) == {0}
