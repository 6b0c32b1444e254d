"""What the bench of engines concludes from its figures."""

from __future__ import annotations

import pytest

from jobs.bench.engines import recipe_of, report
from jobs.bench.kills import Recovery
from jobs.bench.recovery import Measurement
from jobs.deepspeed_config import engine_settings


def took(*seconds: float) -> list[Recovery]:
    return [Recovery(each, each, 0.1) for each in seconds]


@pytest.mark.parametrize(("restart", "ratio", "met"), [(6.0, 12.0, True), (4.0, 8.0, False)])
def test_the_slowest_stage_is_held_against_the_restart(restart: float, ratio: float, met: bool) -> None:
    phases = {"detect": [0.01], "next step": [0.2]}
    engines = {1: Measurement(took(0.2, 0.4), phases), 3: Measurement(took(0.4, 0.6), phases)}
    found = report(engines, Measurement(took(0.05, 0.07)), took(restart - 1, restart + 1))
    assert found.headline["ratio_to_restart"] == pytest.approx(ratio) and found.met is met
    assert found.headline["zero1_median_seconds"] == pytest.approx(0.3)
    assert found.headline["own_median_seconds"] == pytest.approx(0.06)
    assert len({tuple(row) for row in found.rows}) == 1, "all rows have the same columns"


def test_all_three_compute_the_same_job() -> None:
    recipes = [recipe_of(stage) for stage in (None, 1, 3)]
    assert len({str((recipe.model, recipe.data, recipe.parallel)) for recipe in recipes}) == 1
    assert [settings and settings.stage for settings in map(engine_settings, recipes)] == [None, 1, 3]
