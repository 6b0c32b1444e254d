"""The planner's simulation of 1F1B never deadlocks and takes the time that theory gives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.plan import Plan, Stage
from strategies.planning.partition import deal_micro_batches
from strategies.planning.step_time import simulate_step
from strategies.schedules.limits import group_limit, in_flight_limit


def plan_of(groups: Sequence[int], micro_batches: int) -> Plan:
    """One layer per stage; workers numbered through."""
    stages, first = [], 0
    for k, size in enumerate(groups):
        stages.append(Stage(k, k + 1, tuple(range(first, first + size))))
        first += size
    rows = tuple(deal_micro_batches([(w, 1.0) for w in stage.workers], micro_batches) for stage in stages)
    return Plan(0, tuple(stages), rows, ())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_equal_groups_get_the_classical_limit(size: int) -> None:
    plan = plan_of([size] * 4, 48)
    assert [in_flight_limit(plan, stage.workers[0]) for stage in plan.stages] == [4, 3, 2, 1]


def test_unequal_groups_get_one_more_and_idle_workers_none() -> None:
    plan = plan_of([1, 3, 1], 16)
    assert [in_flight_limit(plan, worker) for worker in plan.workers] == [6, 3, 3, 3, 1]
    surplus = plan_of([3], 2)
    assert [in_flight_limit(surplus, worker) for worker in surplus.workers] == [1, 1, 0]


@pytest.mark.parametrize(("stages", "size", "micro_batches"), [(1, 3, 9), (2, 1, 8), (4, 2, 16), (3, 1, 1)])
def test_balanced_pipelines_take_the_textbook_time(stages: int, size: int, micro_batches: int) -> None:
    # (M / g + P - 1) (forward + backward), Narayanan et al., SC'21, sec. 2.2.1.
    plan = plan_of([size] * stages, micro_batches)
    seconds = simulate_step(plan, [1.0] * stages, [2.0] * stages, dict.fromkeys(plan.workers, 1.0))
    assert seconds == (-(-micro_batches // size) + stages - 1) * 3.0


def test_more_in_flight_is_taken_only_while_it_costs_no_activations() -> None:
    # layers x workers; at most all 32 layers' activations of one micro-batch, or one more than the round trip
    assert [group_limit([(5, 3), (9, 4), (9, 4), (9, 4)], k) for k in range(4)] == [6, 3, 2, 1]
    assert [group_limit([(4, 1), (9, 2), (19, 4)], k) for k in range(3)] == [8, 4, 1]
    assert [group_limit([(2, 2), (9, 2), (21, 3)], k) for k in range(3)] == [7, 4, 1]


def test_unsteady_workers_cost_a_balanced_pipeline_a_little() -> None:
    plan = plan_of([2] * 4, 16)
    speeds = dict.fromkeys(plan.workers, 1.0)
    steady = simulate_step(plan, [1.0] * 4, [2.0] * 4, speeds)
    unsteady = simulate_step(plan, [1.0] * 4, [2.0] * 4, speeds, 0.04)
    assert steady < unsteady < 1.04 * steady
    assert unsteady == simulate_step(plan, [1.0] * 4, [2.0] * 4, speeds, 0.04)


def test_speed_divides_seconds() -> None:
    plan = plan_of([1], 5)
    assert simulate_step(plan, [1.0], [2.0], {0: 0.5}) == 30.0


@given(
    groups=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    micro_batches=st.integers(1, 20),
    seconds=st.lists(st.integers(1, 5), min_size=8, max_size=8),
)
@settings(max_examples=100)
def test_every_plan_drains_between_the_bounds(
    groups: list[int], micro_batches: int, seconds: list[int]
) -> None:
    plan = plan_of(groups, micro_batches)
    forward = [float(s) for s in seconds[: len(groups)]]
    backward = [float(s) for s in seconds[4 : 4 + len(groups)]]
    step = simulate_step(plan, forward, backward, dict.fromkeys(plan.workers, 1.0))
    loads = [
        len(plan.micro_batches_of(w)) * (forward[k] + backward[k])
        for k, stage in enumerate(plan.stages)
        for w in stage.workers
    ]
    assert max(max(loads), sum(forward) + sum(backward)) <= step
    assert step <= micro_batches * (sum(forward) + sum(backward))
