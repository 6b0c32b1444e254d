"""The planning bench at a small size: it plans every case, and its report names the slowest one."""

from __future__ import annotations

from dataclasses import replace

from jobs.bench import planning


def test_every_case_is_planned_and_the_slowest_is_reported() -> None:
    results = planning.measure(64, 1)
    assert [each.case for each in results] == ["first plan", "a node lost", "1% at half speed"]
    assert all(each.seconds > 0 and each.step > 1 for each in results)
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
