"""The planner bench without its runs: what it runs, what it compares, and what its report says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.bench import planner
from jobs.bench.planner import Case, Measured, Planning
from runtime.layout import ALIGNMENT, Block, Layout
from strategies.planning.costs import CostModel

LAYOUT = Layout(
    planner.LAYERS,
    tuple(Block(i, f"layer{i}", (i,), (), 64 * ALIGNMENT) for i in range(planner.LAYERS)),
    (),
)
COSTS = replace(
    CostModel.unmeasured(LAYOUT, planner.FORWARD_SECONDS),
    boundary_bytes=(16_384,) * planner.LAYERS,
    kept_bytes=(49_152,) * planner.LAYERS,
    entry_bytes=16_384,
)
PLANNINGS = [Planning("a worker lost", 0.03, "1f1b", 1)]


def test_every_uniform_strategy_and_every_choice_has_a_run_of_its_own() -> None:
    cases, runs = planner.proposals(COSTS)
    uniform = [each for each in runs if planner.is_uniform(each)]
    # one stage; two or four stages of four schedules, of which one may have two or four chunks
    assert {(p.strategy.schedule, p.strategy.chunks, len(p.sizes)) for p in uniform} == {
        ("1f1b", 1, 1),
        *((name, 1, stages) for name in ("1f1b", "gpipe", "zero-bubble") for stages in (2, 4)),
        ("interleaved", 2, 2),
        ("interleaved", 4, 2),
        ("interleaved", 2, 4),
    }
    assert [case.limit is None for case in cases] == [True, False, False]
    for case in cases:
        assert any(planner.same(case.chosen, each) for each in runs)
        assert case.limit is None or case.chosen.memory_bytes <= case.limit
    for each in runs:
        recipe = planner.recipe(each, Path("peaks"))
        assert recipe.model.arguments["of"] == planner.recipe(each).model.build
        assert recipe.parallel.schedule == each.strategy.schedule
        assert recipe.parallel.stages == len(each.sizes)


def test_the_report_says_how_far_the_choice_is_behind() -> None:
    cases, runs = planner.proposals(COSTS)
    exact = [Measured(each, each.step_seconds, each.memory_bytes) for each in runs]
    report = planner.report(exact, cases[:1], PLANNINGS)
    assert report.headline["share_of_best_uniform"] == pytest.approx(1.0)
    assert report.headline["worst_prediction"] == report.headline["worst_memory"] == 0.0
    assert report.met and len(report.rows) == len(runs)
    assert [row["chosen_with"] for row in report.rows].count("all") == 1
    chosen = cases[0].chosen
    late = [replace(m, seconds=m.seconds * (1.5 if m.proposal == chosen else 1)) for m in exact]
    report = planner.report(late, cases[:1], PLANNINGS)
    share = report.headline["share_of_best_uniform"]
    assert share is not None and share < 0.8 and not report.met
    slow = [replace(PLANNINGS[0], seconds=0.06)]
    assert not planner.report(exact, cases[:1], slow).met
    beside = [*PLANNINGS, replace(slow[0], case="96 layers, a worker lost", promised=False)]
    report = planner.report(exact, cases[:1], beside)
    assert report.met and report.headline["seconds_at_64"] == PLANNINGS[0].seconds
    assert any("96 layers, a worker lost (no goal): 0.060 s" in note for note in report.notes)


def test_what_does_not_fit_is_no_rival() -> None:
    _, runs = planner.proposals(COSTS)
    fastest, leaner = runs[0], next(p for p in runs if p.memory_bytes < runs[0].memory_bytes)
    results = [Measured(fastest, 1.0, 1), Measured(leaner, 2.0, 1)]
    assert Case(None, leaner).share(results) == 0.5
    assert Case(fastest.memory_bytes - 1, leaner).share(results) == 1.0
