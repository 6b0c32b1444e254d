"""A plan answers who has what, and what it has worked out for that does not travel."""

from __future__ import annotations

import pickle

import pytest

from runtime.plan import Plan, Shard, Stage

PLAN = Plan(
    3,
    (Stage(0, 2, (1, 4)), Stage(2, 3, (2,))),
    ((4, 1, 4), (2, 2, 2)),
    (Shard(0, 0, 64, 1, 4), Shard(0, 64, 128, 4, 1), Shard(1, 0, 64, 4, 2), Shard(2, 0, 64, 2, 4)),
)


def test_lookups_follow_the_order_of_shards() -> None:
    assert list(PLAN.owned_by(4)) == [PLAN.shards[1], PLAN.shards[2]]
    assert list(PLAN.backed_up_by(4)) == [PLAN.shards[0], PLAN.shards[3]]
    assert list(PLAN.shards_of(0)) == [PLAN.shards[0], PLAN.shards[1]]
    assert [list(found) for found in (PLAN.owned_by(9), PLAN.backed_up_by(9), PLAN.shards_of(9))] == [[]] * 3


def test_micro_batches_of_a_member_only() -> None:
    assert [PLAN.micro_batches_of(worker) for worker in (1, 2, 4)] == [(1,), (0, 1, 2), (0, 2)]
    surplus = Plan(0, (Stage(0, 1, (1, 2)),), ((1, 1),), ())
    assert surplus.micro_batches_of(2) == ()
    with pytest.raises(KeyError):
        PLAN.micro_batches_of(9)


def test_what_was_looked_up_does_not_travel() -> None:
    fresh = Plan(PLAN.generation, PLAN.stages, PLAN.assignment, PLAN.shards)
    plain = pickle.dumps(fresh)
    list(fresh.owned_by(4)), fresh.micro_batches_of(4), fresh.workers
    assert pickle.dumps(fresh) == plain
    assert pickle.loads(plain) == PLAN
