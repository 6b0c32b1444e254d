"""Transfers under each way of keeping: nobody gets what he need not have, and everybody what he needs."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from runtime.change import boundary_transfers
from runtime.layout import Block, Layout
from runtime.plan import Keeping, Plan, Shard, Stage, WorkerId
from runtime.resharding import Holding, Transfer, normalise, plan_transfers, subtract

SIZE = 64 * 6
LAYOUT = Layout(1, (Block(0, "only", (0,), (), SIZE),), ())


def plan_of(workers: tuple[WorkerId, ...], keeping: Keeping, generation: int = 1) -> Plan:
    each = SIZE // len(workers)
    shards = tuple(
        Shard(0, k * each, (k + 1) * each, worker, workers[(k + 1) % len(workers)])
        for k, worker in enumerate(workers)
    )
    return Plan(generation, (Stage(0, 1, workers),), ((workers[0],),), shards, keeping)


def received(transfers: tuple[Transfer, ...], worker: WorkerId, *whats: str) -> list[tuple[int, int]]:
    mine = [t for t in transfers if t.target == worker and t.what in whats]
    intervals = normalise((t.start, t.stop) for t in mine)
    assert sum(t.stop - t.start for t in mine) == sum(stop - start for start, stop in intervals), "disjoint"
    return intervals


@pytest.mark.parametrize(("before", "after"), list(product(Keeping, Keeping)))
def test_a_newcomer_gets_what_the_new_plan_keeps(before: Keeping, after: Keeping) -> None:
    old, new = plan_of((0, 1), before), plan_of((0, 1, 2), after, generation=2)
    transfers = boundary_transfers(LAYOUT, old, new)
    shards = [(shard.start, shard.stop) for shard in new.kept_by(2, LAYOUT)]
    if after is Keeping.NOTHING:
        assert received(transfers, 2, "state") == normalise(shards)
        assert received(transfers, 2, "parameters", "moments") == []
    else:
        assert received(transfers, 2, "parameters") == [(0, SIZE)]
        assert received(transfers, 2, "moments") == normalise(shards)
    assert (normalise(shards) == [(0, SIZE)]) is (after is Keeping.STATE)
    for transfer in transfers:
        assert transfer.source in (0, 1)
        if before is not Keeping.STATE and transfer.what != "parameters":
            own = [(shard.start, shard.stop) for shard in old.owned_by(transfer.source)]
            assert not subtract([(transfer.start, transfer.stop)], own)


@pytest.mark.parametrize(("before", "after"), list(product(Keeping, Keeping)))
def test_who_stays_gets_only_what_it_lacks(before: Keeping, after: Keeping) -> None:
    old, new = plan_of((0, 1), before), plan_of((0, 1), after, generation=2)
    transfers = boundary_transfers(LAYOUT, old, new)
    for worker in (0, 1):
        had = [(s.start, s.stop) for s in old.shards if s.owner == worker or before is Keeping.STATE]
        lacking = subtract([(s.start, s.stop) for s in new.kept_by(worker, LAYOUT)], had)
        assert received(transfers, worker, "state", "moments") == lacking
        needs_parameters = before is Keeping.NOTHING and after is not Keeping.NOTHING
        lacking = subtract([(0, SIZE)], had) if needs_parameters else []
        assert received(transfers, worker, "parameters") == lacking


def test_replicas_serve_what_their_lost_owner_had() -> None:
    plan = plan_of((0, 1, 2), Keeping.STATE)
    everything = {2: [Holding(shard.block, shard.start, shard.stop, 0) for shard in plan.shards]}
    after = replace(plan_of((2,), Keeping.STATE, generation=2), shards=(Shard(0, 0, SIZE, 2, None),))
    assert plan_transfers(LAYOUT, after, 0, everything, {2: {0: 0}}) == ()
