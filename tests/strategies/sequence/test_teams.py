"""Stage groups in teams: everybody in one, leads with all the micro-batches, by speed."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.planning import demand, team_size
from runtime.change import same_work
from runtime.plan import Member
from strategies.planning.costs import CostModel
from strategies.planning.folding import unfolded
from strategies.planning.planner import choose_plan
from strategies.profile import Profile
from strategies.schedules.instructions import Place
from strategies.search.space import Space
from strategies.sequence.sharing import Sharing
from strategies.sequence.teams import Teaming, speeds_of_teams, teamed
from tests.strategies.planning.test_folding import layout_of
from tests.support.cluster import toy_job

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


@pytest.mark.parametrize(("link", "sharing", "useful"), [(1e12, 4, 4), (1.0, 1, 1)])
def test_where_teams_are_searched_for_it_is_as_many_as_the_search_would_have_share(
    tmp_path: Path, link: float, sharing: int, useful: int
) -> None:
    """However many slices there are: over slow links a team is no use, and neither is a second worker."""
    layout = layout_of(4, tied=False)
    parts = (Sharing(heads=8, head_share=0.5, exchanges=2, exchanged_bytes=1_000),) * 4
    profile = Profile(
        (0.1,) * 4,
        (0.2,) * 4,
        (8,) * 4,
        kept_bytes=(16,) * 4,
        split_seconds=((0.1, 0.1),) * 4,
        sharing=parts,
    )
    job = toy_job(
        tmp_path,
        micro_batches=1,
        sequence_slices=8,
        search=Space(stages=(1,), schedules=("1f1b",), recompute=(), sequences=tuple(range(1, 9))),
        link_bytes_per_second=link,
    )
    assert team_size(job, layout, profile, 4) == sharing
    assert demand(layout, profile, 1, 1, 1, 4, sharing) == useful
    assert team_size(job, layout, profile, None) == 1
