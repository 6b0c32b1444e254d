"""Stage groups in teams: everybody in one, leads with all the micro-batches, by speed."""

from __future__ import annotations

import pickle
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from actors.planning import demand
from runtime.change import same_work
from runtime.plan import Member
from strategies.costs import CostModel
from strategies.folding import unfolded
from strategies.planner import choose_plan
from strategies.profile import Profile
from strategies.schedules.instructions import Place
from strategies.sequence.teams import Teaming, speeds_of_teams, teamed
from tests.strategies.test_folding import layout_of

MICRO_BATCHES, SLICES = 6, 8


@given(
    workers=st.integers(1, 9),
    stages=st.integers(1, 3),
    chunks=st.integers(1, 2),
    most=st.integers(1, 5),
    domains=st.integers(1, 3),
)
def test_every_worker_is_in_one_team(workers: int, stages: int, chunks: int, most: int, domains: int) -> None:
    layout = layout_of(8, tied=True)
    members = [Member(worker, f"n{worker % domains}") for worker in range(workers)]
    chosen, _ = choose_plan(1, members, layout, CostModel.unmeasured(layout), MICRO_BATCHES, stages)
    plan = unfolded(chosen, chunks, layout, members, [1.0] * 8)
    made = teamed(plan, Teaming(most, SLICES), members)
    assert (made.stages, made.shards) == (plan.stages, plan.shards)
    assert same_work(made, teamed(plan, Teaming(most, SLICES), members[::-1]))
    assert pickle.loads(pickle.dumps(made)) == made
    for k, stage in enumerate(made.stages):
        teams = made.teams_at(k)
        assert sorted(worker for team in teams for worker in team) == list(stage.workers)
        assert max(map(len, teams)) <= most and len(teams) == -(-len(stage.workers) // most)
        assert set(made.assignment[k]) <= {team[0] for team in teams}
        assert Place.of(made, stage.workers[0]).shape[k] == (stage.stop - stage.first, len(teams))
    if most == 1:
        assert made == plan


def test_micro_batches_follow_the_speed_of_teams() -> None:
    """Three workers in teams of two: two thirds of the micro-batches for the pair."""
    layout = layout_of(4, tied=False)
    members = [Member(worker, f"n{worker}") for worker in range(3)]
    plan, _ = choose_plan(1, members, layout, CostModel.unmeasured(layout), MICRO_BATCHES, 1)
    made = teamed(plan, Teaming(2, SLICES), members)
    assert made.teams == ((0, 1),)
    assert Counter(made.assignment[0]) == {0: 4, 2: 2}
    assert speeds_of_teams(made, Teaming(2, SLICES), {0: 1.0, 1: 0.5, 2: 1.0}) == {0: 1.0}


def test_teams_stay_in_a_failure_domain_where_they_can() -> None:
    layout = layout_of(4, tied=False)
    members = [Member(worker, f"n{worker % 2}") for worker in range(4)]
    plan, _ = choose_plan(1, members, layout, CostModel.unmeasured(layout), MICRO_BATCHES, 1)
    assert teamed(plan, Teaming(2, SLICES), members).teams == ((0, 2), (1, 3))


def test_two_can_share_the_only_micro_batch() -> None:
    """So a second worker is worth asking for, where alone it would have nothing to do."""
    layout = layout_of(4, tied=False)
    profile = Profile((0.1,) * 4, (0.2,) * 4, (0,) * 4)
    assert [demand(layout, profile, 1, 1, 1, 8, sequence) for sequence in (1, 2, 4)] == [1, 2, 4]
