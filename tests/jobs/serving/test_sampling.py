"""Choosing tokens: exact, keyed by (seed, position), and in the right shares."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jobs.serving.generation import Sampling
from jobs.serving.sampling import choose, uniform
from jobs.serving.scheduler import Demand, Limits, admitted

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], dtype=np.float32))


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest() -> None:
    assert choose(LOGITS, Sampling(), 3) == 1
    assert choose(np.zeros(5, dtype=np.float32), Sampling(), 3) == 0


def test_the_noise_belongs_to_seed_and_position() -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    drawn = [choose(LOGITS, sampling, position) for position in range(50)]
    assert drawn == [choose(LOGITS, sampling, position) for position in range(50)]
    assert drawn != [choose(LOGITS, Sampling(temperature=1.0, seed=6), position) for position in range(50)]
    assert len({uniform(5, position) for position in range(1000)}) == 1000
    assert all(0.0 <= uniform(5, position) < 1.0 for position in range(1000))


def test_shares_are_those_of_the_softmax() -> None:
    counts = np.bincount(
        [choose(LOGITS, Sampling(temperature=1.0, seed=1), position) for position in range(4000)], minlength=5
    )
    for share, count in zip(np.exp(LOGITS), counts, strict=True):
        assert abs(count - 4000 * share) < 5 * math.sqrt(4000 * share * (1 - share))


def test_top_p_keeps_the_fewest_likeliest() -> None:
    def seen(top_p: float) -> set[int]:
        sampling = Sampling(temperature=1.0, top_p=top_p, seed=1)
        return {choose(LOGITS, sampling, position) for position in range(500)}

    assert seen(0.3) == {1}
    assert seen(0.5) == {1, 3}
    assert seen(0.8) == {1, 3, 4}
    assert seen(1.0) == {0, 1, 2, 3, 4}


def test_low_temperatures_come_to_the_likeliest() -> None:
    assert {choose(LOGITS, Sampling(temperature=0.01, seed=2), position) for position in range(200)} == {1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_values_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="it must be"):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_admission_goes_by_arrival_and_keeps_the_limits() -> None:
    limits = Limits(sequences=4, prompt_positions=100, cached_positions=1000)
    small, large = Demand(10, 20), Demand(90, 400)
    assert admitted([small] * 9, [], limits) == 4
    assert admitted([small] * 9, [small] * 3, limits) == 1
    assert admitted([small] * 9, [small] * 4, limits) == 0
    assert admitted([large, small, small], [], limits) == 2  # the third prompt waits for the next iteration
    assert admitted([large, large], [large], limits) == 1
    assert admitted([large, small], [large, large], limits) == 0  # nobody overtakes
    assert admitted([Demand(5000, 9000), small], [], limits) == 1  # larger than a limit, but alone
    assert admitted([Demand(5000, 9000)], [small], limits) == 0


def test_limits_that_admit_nobody_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Limits(sequences=0)
