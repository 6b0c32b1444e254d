"""What the bench of throughput concludes from its turns, and that all take part with the same job."""

from __future__ import annotations

import pytest

from jobs.bench.resident import Mark, Turn
from jobs.bench.throughput import PEER, recipe_of, report
from jobs.deepspeed_config import engine_settings


def turns(*seconds: float) -> list[Turn]:
    """One turn of a single step each, on as many seconds of a core."""
    ends = [sum(seconds[: place + 1]) for place in range(len(seconds))]
    return [
        Turn([took], Mark(place, end - took), Mark(place + 1, end))
        for place, (took, end) in enumerate(zip(seconds, ends, strict=True))
    ]


@pytest.mark.parametrize(("fast", "ratio", "met"), [(1.0, 2.0, True), (4.0, 0.5, False)])
def test_ratios_are_medians_over_the_rounds(fast: float, ratio: float, met: bool) -> None:
    found = report(
        {
            "reknit exact": turns(1.0, 2.0, 1.0),
            "reknit fast": turns(fast, fast, 9.0),
            PEER: turns(2.0, 2.0, 2.0),
        }
    )
    assert found.headline == {"exact_ratio": pytest.approx(2.0), "fast_ratio": pytest.approx(ratio)}
    assert found.met is met
    rows = {str(row["what"]): row for row in found.rows}
    assert rows["reknit exact"]["of_peer_by_core_seconds"] == pytest.approx(6.0 / 4.0)
    assert rows[PEER]["of_peer"] == pytest.approx(1.0)


def test_all_compute_the_same_job() -> None:
    recipes = [recipe_of("exact"), recipe_of("fast"), recipe_of("fast", deepspeed=True)]
    same = {str((each.model, each.data, each.parallel, each.optimizer)) for each in recipes}
    assert len(same) == 1 and recipes[0].parallel.stages == 1
    settings = engine_settings(recipes[2])
    assert settings is not None and settings.stage == 1
