"""The search finds what a brute force over every strategy, cut and set of recomputed layers finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import combinations as subsets
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.plan import Strategy
from strategies.planning.costs import CostModel
from strategies.search.cost import Problem, evaluate
from strategies.search.search import NothingFits, Proposal, search
from strategies.search.space import Combination, Space, combinations
from strategies.search.teams import Form, costs_in_form
from strategies.sequence.sharing import Sharing, slice_share


def cost_model(rows: list[tuple[int, int, int, int, int]], link: float = 1e6) -> CostModel:
    """Rows of (forward ms, backward ms, parameters, boundary bytes, kept bytes beyond the boundary)."""
    forward, backward, parameters, boundary, kept = zip(*rows, strict=True)
    return CostModel(
        forward_seconds=tuple(each / 1024 for each in forward),
        backward_seconds=tuple(each / 1024 for each in backward),
        parameter_bytes=tuple(4 * each for each in parameters),
        link_bytes_per_second=link,
        boundary_bytes=boundary,
        split_seconds=tuple((each / 2048, each / 1536) for each in backward),
        kept_bytes=tuple(b + k for b, k in zip(boundary, kept, strict=True)),
        entry_bytes=16,
    )


ROW = st.tuples(
    st.integers(1, 6), st.integers(1, 12), st.integers(0, 40), st.integers(1, 200), st.integers(0, 900)
)
ROWS = st.lists(ROW, min_size=1, max_size=5)


def cuts(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for inner in subsets(range(1, layers), stages - 1):
        yield (0, *inner, layers)


def brute_force(problem: Problem, space: Space, workers: int, limit: int | None) -> float | None:
    """The least step of everything there is."""
    layers = problem.layers
    everything = [again for count in range(layers + 1) for again in subsets(range(layers), count)]
    best = None
    for combination in combinations(space, workers, layers, problem.micro_batches):
        for bounds in cuts(layers, combination.stages):
            for again in everything if space.recompute is None else [space.recompute]:
                cost = evaluate(problem, combination, bounds, again)
                if limit is None or cost.memory_bytes <= limit:
                    best = cost.step_seconds if best is None else min(best, cost.step_seconds)
    return best


SHARING = st.builds(
    Sharing,
    heads=st.integers(0, 5),
    head_share=st.sampled_from([0.0, 0.25, 0.5]),
    exchanges=st.just(2),
    exchanged_bytes=st.integers(0, 400),
)


@given(
    rows=ROWS,
    workers=st.integers(2, 6),
    micro_batches=st.integers(1, 6),
    limit=st.one_of(st.none(), st.integers(500, 20_000)),
    slices=st.sampled_from([None, 3, 4]),
    host_state=st.booleans(),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_nor_where_teams_and_offloading_are_weighed(
    rows: list[tuple[int, int, int, int, int]],
    workers: int,
    micro_batches: int,
    limit: int | None,
    slices: int | None,
    host_state: bool,
    data: st.DataObject,
) -> None:
    sharing = data.draw(st.lists(SHARING, min_size=len(rows), max_size=len(rows)))
    costs = replace(
        cost_model(rows),
        sharing=tuple(sharing),
        slices=slices,
        host_state=host_state,
        host_bytes_per_second=4e4,
        link_seconds_per_message=1e-4,
    )
    problem = Problem(costs, micro_batches, speed=0.8)
    space = Space(
        schedules=("1f1b", "zero-bubble"),
        shardings=("zero1", "zero2"),
        sequences=(1, 2, 3),
        offloads=(None, (2, 1)),
    )
    check_against_brute_force(problem, space, workers, limit)


def test_teams_come_where_activations_do_not_fit_one_worker() -> None:
    # 4 equal layers that keep much: one micro-batch takes 4000 bytes, and the teams' exchanges cost little
    costs = replace(
        cost_model([(4, 8, 10, 8, 1_000)] * 4),
        sharing=(Sharing(heads=4, head_share=0.5, exchanges=2, exchanged_bytes=64),) * 4,
    )
    problem = Problem(costs, 4)
    space = Space(stages=(1,), sequences=(1, 2, 4), recompute=())
    (roomy,) = search(problem, space, 4, None)
    assert roomy.strategy.sequence == 1
    whole, halved, quartered = (
        next(p for p in search(problem, space, 4, None, most=9) if p.strategy.sequence == team)
        for team in (1, 2, 4)
    )
    assert whole.memory_bytes > halved.memory_bytes > quartered.memory_bytes
    assert whole.step_seconds < halved.step_seconds < quartered.step_seconds
    (tight,) = search(problem, space, 4, whole.memory_bytes - 1)
    assert tight.strategy.sequence == 2
    (simulated,) = search(problem, space, 4, whole.memory_bytes - 1, simulated=1)
    assert simulated.step_seconds == pytest.approx(tight.step_seconds, rel=1e-6)


def test_an_uneven_team_waits_for_the_member_with_most() -> None:
    layer = Sharing(heads=3, head_share=0.5, exchanges=2, exchanged_bytes=1_000)
    assert layer.ratio(2, 2) == 0.5 * 1 / 2 + 0.5 * 2 / 3
    assert layer.ratio(1, 3) == 1.0 and layer.sent_bytes(1, 3) == 0.0
    # heads 2 and 1 of 3, slices 1 and 1 of 2: each sends half of the slices' other heads, and its heads back
    assert layer.sent_bytes(2, 2) == 500 * 0.5
    # its messages are on their way together, and it has none alone
    assert (layer.waits(1), layer.waits(2), layer.waits(4)) == (0, 2, 2)
    assert layer.kept_share(2, 2) == Fraction(2, 3)
    assert Sharing().kept_share(2, 2) == slice_share(2, 2) == Fraction(1, 2)


def test_a_team_counts_each_layer_by_itself_and_hands_on_slices() -> None:
    # heads divide 3 to 2, slices evenly; of the first layer's 1000 bytes 600 are its output
    costs = replace(
        cost_model([(4, 8, 10, 600, 400), (4, 8, 10, 30, 100)]),
        sharing=(Sharing(heads=5, head_share=0.5, exchanges=2, exchanged_bytes=1_000), Sharing()),
        slices=4,
        link_seconds_per_message=0.01,
    )
    shared, again = costs_in_form(costs, Form(2), 1.0)
    assert shared.boundary_bytes == (300, 15) and shared.entry_bytes == 8
    assert shared.kept_bytes == (300 + 400 * 3 // 5, 15 + 50)
    exchange = shared.forward_seconds[0] - again[0]
    # either sends its half of the slices of the others' heads, and its heads of the other half; two latencies
    assert exchange == pytest.approx(500 * (0.5 * 0.6 + 0.5 * 0.4) / 1e6 + 2 * 0.01)
    assert shared.forward_seconds[1] == again[1] == costs.forward_seconds[1] / 2
    problem = Problem(costs, 4).of(Combination(Strategy("1f1b", 1, sequence=2), (2, 2)))
    assert problem.crossing_seconds(1) == 2 * (300 / 1e6 + 0.01)


def test_teams_whose_sharing_was_not_measured_are_not_weighed() -> None:
    with pytest.raises(AssertionError, match="how they divide the layers"):
        costs_in_form(cost_model([(4, 8, 10, 8, 100)]), Form(2), 1.0)


def test_offloading_spares_what_is_beside_the_window_and_costs_what_is_not_hidden() -> None:
    rows = [(4, 8, 1_000, 8, 100)] * 6
    costs = replace(cost_model(rows), host_state=True, host_bytes_per_second=4_000 * 1024 / 6)
    problem, space = Problem(costs, 2), Space(stages=(1,), recompute=(), offloads=(None, (2, 1)))
    (plain,) = search(problem, space, 2, None)
    assert plain.strategy.offload is None
    (spared,) = search(problem, space, 2, plain.memory_bytes - 1)
    assert spared.strategy.offload == (2, 1)
    # parameters of 6 layers and their sums go, those of 3 layers come
    assert plain.memory_bytes - spared.memory_bytes == 6 * 12 * 1_000 - 3 * 4 * 1_000
    # each layer takes 6 ms to come: 2 more than its forward, nothing more than its backward
    assert spared.step_seconds - plain.step_seconds == pytest.approx(6 * 2 / 1024)


@given(
    rows=ROWS,
    workers=st.integers(1, 6),
    micro_batches=st.integers(1, 9),
    limit=st.one_of(st.none(), st.integers(500, 20_000)),
    fixed=st.booleans(),
    shardings=st.sampled_from([("zero1",), ("zero3", "ddp"), ("zero2", "zero3")]),
)
@settings(max_examples=30, deadline=None)
def test_nothing_that_a_brute_force_finds_is_better(
    rows: list[tuple[int, int, int, int, int]],
    workers: int,
    micro_batches: int,
    limit: int | None,
    fixed: bool,
    shardings: tuple[str, ...],
) -> None:
    problem = Problem(cost_model(rows), micro_batches)
    space = Space(recompute=(0,) if fixed else None, shardings=shardings)
    check_against_brute_force(problem, space, workers, limit)


@given(
    kinds=st.lists(ROW, min_size=1, max_size=2),
    order=st.lists(st.booleans(), min_size=3, max_size=5),
    workers=st.integers(2, 6),
    limit=st.one_of(st.none(), st.integers(500, 20_000)),
)
@settings(max_examples=25, deadline=None)
def test_nor_where_layers_are_alike(
    kinds: list[tuple[int, int, int, int, int]], order: list[bool], workers: int, limit: int | None
) -> None:
    problem = Problem(cost_model([kinds[-each] for each in order]), 7)
    check_against_brute_force(problem, Space(), workers, limit)


def check_against_brute_force(problem: Problem, space: Space, workers: int, limit: int | None) -> None:
    """The search finds what no other strategy and cut is faster than, or says that nothing fits."""
    expected = brute_force(problem, space, workers, limit)
    if expected is None:
        with pytest.raises(NothingFits, match="more memory"):
            search(problem, space, workers, limit)
        return
    (found,) = search(problem, space, workers, limit)
    assert found.step_seconds == pytest.approx(expected, rel=1e-9)
    assert again(problem, found) == pytest.approx(expected, rel=1e-9)
    assert limit is None or found.memory_bytes <= limit


def again(problem: Problem, found: Proposal) -> float:
    """What the cost model says of a proposal."""
    combination = Combination(found.strategy, found.sizes)
    return evaluate(problem, combination, found.bounds, found.strategy.recompute).step_seconds


MISLEADING = (
    (
        [
            (5, 2, 31, 196, 267),
            (1, 1, 9, 170, 600),
            (4, 12, 23, 82, 788),
            (1, 5, 31, 51, 747),
            (4, 9, 34, 175, 96),
        ],
        3,
        8,
        6535,
    ),
    (
        [
            (5, 8, 10, 61, 813),
            (4, 1, 11, 130, 751),
            (6, 11, 27, 139, 729),
            (1, 8, 38, 23, 705),
            (5, 6, 23, 128, 268),
        ],
        3,
        7,
        6024,
    ),
    (
        [
            (2, 1, 1, 58, 145),
            (2, 2, 26, 127, 142),
            (5, 3, 5, 151, 302),
            (4, 2, 17, 156, 505),
            (4, 11, 36, 30, 642),
        ],
        4,
        6,
        4977,
    ),
)


def test_where_later_stages_keep_by_the_first_ones_length_the_best_is_found_too() -> None:
    # the cut that a bound suggests fits in each of these, and is not the best
    space = Space(schedules=("zero-bubble",), stages=(3,))
    for rows, workers, micro_batches, limit in MISLEADING:
        problem = Problem(cost_model(rows), micro_batches)
        (found,) = search(problem, space, workers, limit)
        assert found.step_seconds == pytest.approx(brute_force(problem, space, workers, limit), rel=1e-9)


@given(rows=ROWS, workers=st.integers(1, 6), limits=st.tuples(st.integers(500, 9_000), st.integers(0, 9_000)))
@settings(max_examples=30, deadline=None)
def test_more_memory_is_never_slower(
    rows: list[tuple[int, int, int, int, int]], workers: int, limits: tuple[int, int]
) -> None:
    problem, (less, more) = Problem(cost_model(rows), 6), limits
    try:
        (tight,) = search(problem, Space(), workers, less)
    except NothingFits:
        return
    (roomy,) = search(problem, Space(), workers, less + more)
    (free,) = search(problem, Space(), workers, None)
    close = 1 + 1e-9
    assert free.step_seconds <= roomy.step_seconds * close <= tight.step_seconds * close**2


@given(rows=ROWS, workers=st.integers(1, 6), limit=st.integers(2_000, 20_000))
@settings(max_examples=25, deadline=None)
def test_the_list_is_whole_ordered_and_the_same_again(
    rows: list[tuple[int, int, int, int, int]], workers: int, limit: int
) -> None:
    problem, space = Problem(cost_model(rows), 6), Space()
    try:
        found = search(problem, space, workers, limit, most=100)
    except NothingFits:
        return
    assert found == search(problem, space, workers, limit, most=100)
    assert found[:3] == search(problem, space, workers, limit, most=3)
    seconds = [each.step_seconds for each in found]
    assert seconds == sorted(seconds)
    for each in found:
        assert sum(each.sizes) == workers and each.memory_bytes <= limit and 0 <= each.bubble < 1
        assert all(a < b for a, b in pairwise(each.bounds)) and each.bounds[-1] == len(rows)


ALIKE = [(4, 8, 10, 8, 100)] * 8


def test_the_best_is_simulated_and_equals_the_formula_for_a_pipeline_of_equals() -> None:
    problem = Problem(cost_model(ALIKE, link=1e12), 8)
    for schedule in ("gpipe", "1f1b", "zero-bubble", "interleaved"):
        space = Space(stages=(4,), schedules=(schedule,))
        (by_formula,) = search(problem, space, 4, None)
        (simulated,) = search(problem, space, 4, None, simulated=1)
        assert simulated.simulated and not by_formula.simulated
        # zero-bubble's formula is a bound, which it reaches with weight gradients as long as the rest
        close = 0.05 if schedule == "zero-bubble" else 1e-6
        assert simulated.step_seconds == pytest.approx(by_formula.step_seconds, rel=close), schedule


def test_what_simulation_finds_to_be_slower_is_passed_over() -> None:
    # with 6 micro-batches on 4 groups interleaving is no pipeline of the textbook's
    problem = Problem(cost_model(ALIKE, link=1e12), 6)
    space = Space(stages=(4,))
    by_formula = search(problem, space, 4, None, most=4)
    simulated = search(problem, space, 4, None, most=4, simulated=4)
    assert simulated[0].step_seconds <= min(
        each.step_seconds for each in simulated if each.strategy == by_formula[0].strategy
    )


def test_a_tolerance_misses_the_best_by_no_more() -> None:
    rows = [(1 + i * 5 % 7, 2 + i * 3 % 5, 10 * (i % 3), 8 + i, 90 * (1 + i % 4)) for i in range(12)]
    problem = Problem(cost_model(rows), 12)
    for limit in (3_000, 5_000, 9_000):
        (best,) = search(problem, Space(), 6, limit)
        (near,) = search(problem, Space(), 6, limit, tolerance=0.05)
        assert best.step_seconds <= near.step_seconds <= best.step_seconds / (1 - 0.05)


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    problem = Problem(cost_model([(1, 2, 1_000, 8, 100)] * 2), 4)
    with pytest.raises(NothingFits, match=r"for 2 workers fits 1000 bytes of memory each: the leanest needs"):
        search(problem, Space(), 2, 1000)


def test_what_no_workers_and_layers_fit_is_said_with_memory_in_plenty_too() -> None:
    """Four chunks of each worker want four layers."""
    problem = Problem(cost_model([(1, 2, 1_000, 8, 100)] * 3), 4)
    space = Space(schedules=("interleaved",), chunks=4)
    for limit in (None, 1 << 40):
        with pytest.raises(
            ValueError, match="no schedule, number of chunks and sequence degree of these fits"
        ):
            search(problem, space, 2, limit)


def test_names_that_nobody_knows_are_refused() -> None:
    with pytest.raises(ValueError, match="'ring' is no schedule that can be searched for: choose from 1f1b"):
        Space(schedules=("ring",))
    with pytest.raises(ValueError, match="'zero9' is no sharding"):
        Space(shardings=("zero9",))
