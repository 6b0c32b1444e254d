"""The planning bench at a small size: it plans every case, and its report names the slowest one."""

from __future__ import annotations

from dataclasses import replace

from jobs.bench import planning
from strategies.planning.planner import CostModel, choose_plan


def test_every_case_is_planned_and_the_slowest_is_reported() -> None:
    results = planning.measure(64, 1)
    assert [each.case for each in results] == ["first plan", "a node lost", "1% at half speed"]
    assert all(each.seconds > 0 and each.step > 1 for each in results)
    assert [each.transfers is None for each in results] == [True, False, False]
    cases = [
        replace(each, workers=workers, seconds=0.01 * (i + 1))
        for workers in planning.GOALS
        for i, each in enumerate(results)
    ]
    report = planning.report(cases)
    assert report.headline == {"seconds_at_1000": 0.03, "seconds_at_100000": 0.03}
    assert report.met and len(report.rows) == 6
    slow = [replace(each, seconds=0.06) if each.workers == 1_000 else each for each in cases]
    assert not planning.report(slow).met


def test_after_a_loss_everything_wanted_comes_from_a_survivor() -> None:
    layout, members = planning._layout(), planning._members(32)
    costs = CostModel.unmeasured(layout)
    old, _ = choose_plan(0, members, layout, costs, 16, 4)
    new, _ = choose_plan(1, members[8:], layout, costs, 16, 4, old)
    transfers = planning.after_loss(layout, old, new)
    assert transfers and min(transfer.source for transfer in transfers) >= 8
    assert {transfer.target for transfer in transfers} <= set(new.workers)
