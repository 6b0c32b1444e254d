"""How many workers are worth asking for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.layout import ALIGNMENT, Block, Layout
from runtime.plan import Member
from strategies.planning.costs import CostModel
from strategies.planning.demand import ALIKE, useful_workers
from strategies.planning.planner import choose_plan


def job(layers: int, seconds: float = 0.01, units: int = 8) -> tuple[Layout, CostModel]:
    blocks = tuple(Block(i, f"layer{i}", (i,), (), units * ALIGNMENT) for i in range(layers))
    layout = Layout(layers, blocks, ())
    return layout, CostModel.unmeasured(layout, seconds)


def predicted(layout: Layout, costs: CostModel, micro_batches: int, stages: int, workers: int) -> float:
    members = [Member(worker, str(worker)) for worker in range(workers)]
    return choose_plan(0, members, layout, costs, micro_batches, stages)[1].step_seconds


@pytest.mark.parametrize(
    ("micro_batches", "most", "useful"),
    [
        (12, 12, 12),
        (12, 11, 6),  # two each; seven to eleven would have two at most as well
        (12, 5, 4),
        (5, 4, 3),
        (4, 100, 4),  # there is nothing to do for more
        (1, 8, 1),
    ],
)
def test_in_one_stage_it_is_the_first_of_those_with_as_many_micro_batches_each(
    micro_batches: int, most: int, useful: int
) -> None:
    layout, costs = job(4)
    assert useful_workers(layout, costs, micro_batches, 1, 1, most) == useful


def test_never_fewer_than_the_least() -> None:
    layout, costs = job(4)
    assert useful_workers(layout, costs, 4, 1, 6, 8) == 6
    assert useful_workers(layout, costs, 4, 1, 3, 3) == 3


def test_where_talking_takes_longer_than_computing_one_is_enough() -> None:
    layout, costs = job(4, seconds=1e-7, units=10_000)
    assert useful_workers(layout, costs, 8, 1, 1, 8) == 1


def test_more_stages_find_work_for_more() -> None:
    layout, costs = job(8)
    assert useful_workers(layout, costs, 4, 1, 1, 64) == 4
    assert useful_workers(layout, costs, 4, 2, 1, 64) > 4


@given(
    layers=st.integers(1, 6),
    micro_batches=st.integers(1, 12),
    stages=st.integers(1, 3),
    least=st.integers(1, 4),
    more=st.integers(0, 12),
)
@settings(max_examples=40)
def test_more_are_not_faster_and_one_fewer_is_slower(
    layers: int, micro_batches: int, stages: int, least: int, more: int
) -> None:
    layout, costs = job(layers)
    useful = useful_workers(layout, costs, micro_batches, stages, least, least + more)
    assert least <= useful <= least + more
    seconds = predicted(layout, costs, micro_batches, stages, useful)
    most = predicted(layout, costs, micro_batches, stages, least + more)
    assert seconds <= most * (1 + 2 * ALIKE)
    if useful > least:
        assert predicted(layout, costs, micro_batches, stages, useful - 1) > seconds
