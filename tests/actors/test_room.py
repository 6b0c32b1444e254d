"""Memory that is made ready for layers to come."""

from __future__ import annotations

import torch

from actors.room import Room
from runtime.plan import Plan, Stage
from strategies.model import build_model
from strategies.options import WHOLE, Keeps, Precision
from strategies.stage import StageModel
from tests.support.models import build

WORKER = 1
PLAN = Plan(2, (Stage(0, 1, (0,)), Stage(1, 4, (WORKER,))), ((0, WORKER),), ())


def stage(keeps: Keeps = WHOLE) -> StageModel:
    """Holds layers 2 to 4, all their parameters 1.0 in version 5."""
    made = StageModel(
        build_model(build, seed=7),
        seed=7,
        precision=Precision(),
        device=torch.device("cpu"),
        exact=True,
        keeps=keeps,
    )
    made.hold((2, 5))
    for block, working_N in made.working.items():
        working_N.fill_(1.0)
        made.version[block] = 5
    return made


def test_a_stage_computes_in_the_memory_that_was_made_ready() -> None:
    made = stage()
    held, tensors = set(made.working), dict(made.working)
    room = Room(made, PLAN, WORKER)
    room._thread.join()
    assert set(made.working) == held, "it goes on with what it has until the boundary"
    room.give(made)
    fresh = set(made.working) - held
    assert fresh and fresh == set(made.accumulators) - held
    ready = {block: made.working[block].data_ptr() for block in fresh}
    made.hold((1, 4))
    for block in fresh:
        assert made.version[block] is None, "nothing has come yet"
        assert made.working[block].data_ptr() == ready[block]
        assert not made.working[block].any() and not made.accumulators[block].any()
        assert made.accumulators[block].dtype == torch.float64
    for block in set(made.working) - fresh:
        assert made.working[block] is tensors[block] and made.version[block] == 5
    used = {parameter.data_ptr() for layer in made._layers[1:4] for parameter in layer.parameters()}
    assert set(ready.values()) <= used


def test_what_is_not_given_leaves_no_trace() -> None:
    made = stage()
    held = set(made.working)
    room = Room(made, PLAN, WORKER)
    room.close()
    assert not room._thread.is_alive()
    assert set(made.working) == set(made.version) == set(made.accumulators) == held


def test_a_stage_that_keeps_no_sums_gets_none() -> None:
    made = stage(Keeps(sums=False))
    room = Room(made, PLAN, WORKER)
    room.give(made)
    assert not made.accumulators
    assert any(version is None for version in made.version.values())
