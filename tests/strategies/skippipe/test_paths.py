"""Paths over part of a model's stages: what must hold of each, of all together, and of the layers."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.plan import Plan, Stage
from strategies.schedules.even import even_path_plan, even_plan
from strategies.schedules.instructions import Work
from strategies.schedules.registry import schedule_named
from strategies.schedules.simulation import StageSeconds, Timeline, simulate
from strategies.skippipe.paths import find_paths
from strategies.skippipe.search import search_paths, swaps_of

SKIPPIPE = schedule_named("skippipe", 1)


@settings(max_examples=40, deadline=None)
@given(
    stages=st.integers(2, 7),
    taken=st.integers(2, 7),
    micro_batches=st.integers(1, 14),
    swaps=st.integers(0, 2),
)
def test_every_path_keeps_the_rules(stages: int, taken: int, micro_batches: int, swaps: int) -> None:
    taken = min(taken, stages)
    micro_batches = max(micro_batches, -(-(stages - 1) // (taken - 1)))
    paths = search_paths(stages, taken, micro_batches, swaps)
    assert len(paths) == micro_batches
    for path in paths:
        assert path[0] == 0 and len(path) == taken == len(set(path)) and max(path) < stages
        assert swaps_of(path) <= swaps
        for place, stage in enumerate(path):
            assert max(path[: place + 1]) - stage <= 1
    passed = Counter(stage for path in paths for stage in path)
    others = [passed[stage] for stage in range(1, stages)]
    assert min(others) >= 1 and max(others) - min(others) <= 1, "all stages are passed equally often"
    assert paths == search_paths(stages, taken, micro_batches, swaps)


def test_without_skipping_and_swaps_everything_is_passed_in_order() -> None:
    assert search_paths(5, 5, 7, 0) == ((0, 1, 2, 3, 4),) * 7
    assert search_paths(1, 1, 3) == ((0,),) * 3


def test_swaps_are_late_stages() -> None:
    assert [swaps_of(path) for path in ((0, 1, 3), (0, 2, 1, 3), (0, 2, 1, 4, 3))] == [0, 1, 2]
    assert any(map(swaps_of, search_paths(6, 4, 24, 2))), "a swap resolves what would else be waiting"


@pytest.mark.parametrize(
    ("numbers", "match"),
    [((4, 5, 8), "more than there are"), ((6, 2, 4), "do not reach all of the 6"), ((0, 1, 1), "at least 1")],
)
def test_impossible_numbers_are_refused(numbers: tuple[int, int, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        search_paths(*numbers)


def step(stages: int, taken: int, paths: tuple[tuple[int, ...], ...]) -> Timeline:
    """One worker a stage, each with as much to do in a step; the end takes nothing."""
    plan = even_path_plan(stages, paths)
    share = (taken - 1) / (stages - 1)
    usual = stages / (stages - 1 + share)
    seconds = [StageSeconds(*[share * usual] * 3), *[StageSeconds(*[usual] * 3)] * (stages - 1)]
    return simulate(SKIPPIPE, plan, [*seconds, StageSeconds(0.0, 0.0, 0.0)], message_seconds=0.05)


@pytest.mark.parametrize(("stages", "taken", "micro_batches"), [(6, 4, 24), (6, 3, 24), (8, 4, 32)])
def test_skipping_shortens_the_step(stages: int, taken: int, micro_batches: int) -> None:
    """By about the share that is skipped; and searched paths meet less than random ones."""
    full = simulate(
        schedule_named("1f1b", 1),
        even_plan(stages, micro_batches),
        [StageSeconds(1.0, 1.0, 1.0)] * stages,
        message_seconds=0.05,
    )
    for swaps in (0, 2):
        searched = step(stages, taken, search_paths(stages, taken, micro_batches, swaps))
        assert searched.seconds < (taken / stages + 0.1) * full.seconds
        assert max(searched.peaks.values()) <= 1.5 * stages
        for seed in range(3):
            drawn = random.Random(seed)
            anyhow = tuple(
                (0, *sorted(drawn.sample(range(1, stages), taken - 1))) for _ in range(micro_batches)
            )
            assert searched.seconds < step(stages, taken, anyhow).seconds


@settings(max_examples=60, deadline=None)
@given(data=st.data(), groups=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_any_paths_on_any_groups_come_home(data: st.DataObject, groups: list[int]) -> None:
    """No order of arrival deadlocks; everything is computed once, in the order of its path."""
    stages, micro_batches = data.draw(st.integers(len(groups), 6)), data.draw(st.integers(1, 8))
    paths = []
    for _ in range(micro_batches):
        others = data.draw(st.permutations(range(1, stages)))
        paths.append((0, *others[: data.draw(st.integers(0, stages - 1))], stages))
    starts = [sum(groups[:k]) for k in range(len(groups))]
    members = [tuple(range(start, start + size)) for start, size in zip(starts, groups, strict=True)]
    held = [members[min(k * len(groups) // stages, len(groups) - 1)] for k in range(stages + 1)]
    plan_stages = tuple(Stage(k, k + 1, group) for k, group in enumerate(held))
    rows = tuple(tuple(group[m % len(group)] for m in range(micro_batches)) for group in held)
    plan = Plan(0, plan_stages, rows, (), paths=tuple(paths))
    each = [StageSeconds(*data.draw(st.tuples(*[st.integers(1, 4)] * 3))) for _ in plan_stages]
    timeline = simulate(SKIPPIPE, plan, each, message_seconds=data.draw(st.sampled_from([0.0, 0.25])))
    by_place = {(span.micro_batch, span.stage, span.work): span for span in timeline.spans}
    assert len(by_place) == len(timeline.spans) == 2 * sum(map(len, paths))
    for m, path in enumerate(paths):
        for one, other in pairwise(path):
            assert by_place[m, one, Work.FORWARD].end <= by_place[m, other, Work.FORWARD].begin
            assert by_place[m, other, Work.BACKWARD].end <= by_place[m, one, Work.BACKWARD].begin


def test_layers_are_divided_so_that_all_stages_have_as_much_to_do() -> None:
    found = find_paths(layers=26, micro_batches=10, stages=6, taken=4)
    sizes = [stop - first for first, stop in pairwise(found.bounds)]
    assert sum(sizes) == 26 and sizes[-1] == 1
    assert sizes[0] == 1 + 2 and set(sizes[1:-1]) <= {4, 5}, "3/5 of the others' blocks, and the embedding"
    assert all(path[0] == 0 and path[-1] == 6 for path in found.of)
    assert found.share(0) == found.share(6) == 1.0 and found.share(3) == 0.6
    even = find_paths(layers=14, micro_batches=4, stages=6, taken=6)
    assert even.bounds == (0, 3, 5, 7, 9, 11, 13, 14) and set(even.of) == {even.full}


def test_half_the_depth_is_every_other_stage() -> None:
    found = find_paths(layers=14, micro_batches=4, stages=6, taken=4)
    assert found.half == (0, 2, 4, 6)
    assert found.bounds == (0, 2, 4, 6, 8, 10, 13, 14)
    assert found.layers_of((0, 2, 6)) == (0, 1, 4, 5, 13)
    assert find_paths(layers=7, micro_batches=4, stages=5, taken=5).half == (0, 2, 4, 5)


def test_too_few_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="7 layers are too few for 6 stages that may be skipped"):
        find_paths(layers=7, micro_batches=8, stages=6, taken=4)
