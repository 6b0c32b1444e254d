"""What a plan with paths says of who does what, and what of it is put on record and travels."""

from __future__ import annotations

import pickle
from dataclasses import replace

from runtime.plan import Plan, Stage, Strategy
from runtime.plan_record import plan_to_json
from runtime.salvage import Salvage, Status, kept, remaining

STAGES = (Stage(0, 1, (0,)), Stage(1, 3, (1, 2)), Stage(3, 4, (1, 2)), Stage(4, 5, (0,)))
ROWS = ((0, 0, 0), (1, 2, 1), (1, 2, 1), (0, 0, 0))
PATHS = ((0, 1, 2, 3), (0, 3), (0, 2, 1, 3))
PLAN = Plan(3, STAGES, ROWS, (), paths=PATHS)


def test_a_micro_batch_goes_where_its_path_leads() -> None:
    assert [PLAN.after(2, k) for k in (0, 2, 1, 3)] == [2, 1, 3, None]
    assert [PLAN.before(2, k) for k in (0, 2, 1, 3)] == [None, 0, 2, 1]
    assert PLAN.after(1, 0) == 3 and PLAN.before(1, 3) == 0 and not PLAN.passes(1, 2)
    assert PLAN.micro_batches_of(1, 1) == (0, 2) and PLAN.micro_batches_of(2, 1) == ()
    assert PLAN.micro_batches_of(0, 3) == (0, 1, 2)


def test_without_paths_all_stages_follow_each_other() -> None:
    plain = Plan(3, STAGES, ROWS, ())
    assert [plain.after(1, k) for k in range(4)] == [1, 2, 3, None]
    assert [plain.before(1, k) for k in range(4)] == [None, 0, 1, 2]
    assert plain.micro_batches_of(2, 1) == (1,) and "paths" not in plan_to_json(plain)


def test_paths_travel_and_are_put_on_record() -> None:
    there = pickle.loads(pickle.dumps(PLAN))
    assert there == PLAN and there.paths == PATHS
    assert plan_to_json(PLAN)["paths"] == [[0, 1, 2, 3], [0, 3], [0, 2, 1, 3]]


def test_a_strategy_that_was_chosen_is_put_on_record_in_words() -> None:
    assert "strategy" not in plan_to_json(PLAN)
    for strategy, words in (
        (Strategy("1f1b"), "1f1b, zero1"),
        (Strategy("interleaved", 2, "zero3", recompute=(4,)), "interleaved x2, zero3, 1 layer recomputed"),
        (Strategy("gpipe", sequence=3, recompute=(1, 2)), "gpipe, zero1, teams of 3, 2 layers recomputed"),
    ):
        assert plan_to_json(replace(PLAN, strategy=strategy))["strategy"] == words


def test_only_what_is_passed_has_to_be_done() -> None:
    none = Salvage(1, frozenset(), ({}, {}, {}, {}))
    assert remaining(PLAN, none) == {0: {0: 3, 3: 3}, 1: {1: 2, 2: 2}, 2: {1: 0, 2: 0}}
    some = Salvage(1, frozenset({1}), ({}, {0: Status.DONE, 2: Status.FORWARD}, {}, {}))
    assert remaining(PLAN, some)[1] == {1: 1, 2: 2}
    # two layers of 5 + 2 + 5 that micro-batches pass
    assert kept(PLAN, some) == 2 / 12
