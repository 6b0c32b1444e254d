"""Slow workers and slow layers are told apart by what the workers of a stage have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import pytest

from runtime.protocol import Measured
from runtime.speeds import RECENT, WINDOW, Speeds

LAYERS, FORWARD, BACKWARD = 8, 0.01, 0.02
Groups = Sequence[tuple[int, ...]]
Factor = Callable[[int, int], float]
"""(worker, layer) -> how many times the usual seconds."""


def warmed_up() -> Speeds:
    speeds = Speeds()
    speeds.warm_up([FORWARD] * LAYERS, [BACKWARD] * LAYERS)
    return speeds


def run(speeds: Speeds, groups: Groups, steps: int, factor: Factor, begin: int = 1) -> None:
    """Every group measures its even part of the layers, step after step."""
    each = LAYERS // len(groups)
    for step in range(begin, begin + steps):
        for k, group in enumerate(groups):
            for worker in group:
                layers = range(k * each, (k + 1) * each)
                forward = {layer: FORWARD * factor(worker, layer) for layer in layers}
                backward = {layer: BACKWARD * factor(worker, layer) for layer in layers}
                speeds.observe(Measured(worker, step, forward, backward))


def speeds_of(speeds: Speeds, workers: int) -> list[float]:
    return [round(speeds.of(worker), 6) for worker in range(workers)]


PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7)]


@pytest.mark.parametrize("groups", [PAIRS, [(0, 1, 2, 3, 4, 5, 6), (7,)], [(0, 1, 2), (3, 4, 5, 6, 7)]])
def test_a_worker_at_half_speed_is_seen_and_stays_seen(groups: Groups) -> None:
    speeds = warmed_up()
    run(speeds, groups, 20, lambda worker, layer: 1.0)
    assert speeds_of(speeds, 8) == [1.0] * 8
    run(speeds, groups, RECENT // 2 + 1, lambda worker, layer: 1.0 + (worker == 7), 21)
    for begin in range(40, 100, 7):
        assert speeds_of(speeds, 8) == [1.0] * 7 + [0.5]
        assert {speeds.forward(layer) for layer in range(LAYERS)} == {FORWARD}
        run(speeds, groups, 7, lambda worker, layer: 1.0 + (worker == 7), begin)
    run(speeds, groups, RECENT, lambda worker, layer: 1.0, 200)
    assert speeds_of(speeds, 8) == [1.0] * 8


def test_layers_that_all_their_holders_find_slow_are_slow() -> None:
    speeds = warmed_up()
    run(speeds, PAIRS, WINDOW + RECENT, lambda worker, layer: 2.0 if layer >= 6 else 1.0)
    assert [speeds.forward(layer) / FORWARD for layer in range(LAYERS)] == [1.0] * 6 + [2.0] * 2
    assert [speeds.backward(layer) / BACKWARD for layer in range(LAYERS)] == [1.0] * 6 + [2.0] * 2
    assert speeds_of(speeds, 8) == [1.0] * 8


def test_everybody_slow_is_nobody_slow() -> None:
    speeds = warmed_up()
    run(speeds, [(0, 1), (2, 3, 4), (5,), (6,)], 2 * WINDOW, lambda worker, layer: 3.0)
    assert speeds_of(speeds, 7) == [1.0] * 7
    assert {speeds.forward(layer) for layer in range(LAYERS)} == {3.0 * FORWARD}


def test_noise_neither_makes_workers_slow_nor_carries_layers_away() -> None:
    random = Random(3)
    speeds = warmed_up()

    def noisy(slow: int, worker: int, layer: int) -> float:
        return random.uniform(0.9, 1.1) * (1.0 + (worker == slow))

    for worker in (7, 0):  # slow one after the other, alone in its stage or not
        run(
            speeds,
            [(0, 1, 2), (3, 4), (5, 6), (7,)],
            400,
            partial(noisy, worker),
            1 + 400 * (worker == 0),
        )
        slow = [w for w in range(8) if speeds.of(w) != 1.0]
        assert slow == [worker] and abs(speeds.of(worker) - 0.5) < 0.05
        assert all(abs(speeds.forward(layer) / FORWARD - 1.0) < 0.1 for layer in range(LAYERS))


def test_a_worker_counts_as_usual_until_it_was_measured_often_enough() -> None:
    speeds = warmed_up()
    run(speeds, PAIRS, RECENT - 1, lambda worker, layer: 1.0 + (worker == 7))
    assert speeds_of(speeds, 8) == [1.0] * 8
    run(speeds, PAIRS, 1, lambda worker, layer: 1.0 + (worker == 7), RECENT)
    assert speeds.of(7) == pytest.approx(0.5)
