"""Every schedule under the simulated clock: the textbook's bubble and memory, no deadlock, all work once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.plan import Plan, Stage
from strategies.planning.partition import deal_micro_batches
from strategies.planning.step_time import simulate_step
from strategies.schedules.even import even_plan
from strategies.schedules.instructions import Instruction, Offer, Place, Tally, Work
from strategies.schedules.registry import SCHEDULES, schedule_named
from strategies.schedules.simulation import Span, StageSeconds, Timeline, simulate

ONE = StageSeconds(1.0, 1.0, 1.0)
SHAPES = [(1, 3), (2, 1), (4, 4), (4, 16), (3, 7), (8, 32)]


PLAIN = [name for name, entry in SCHEDULES.items() if not entry.chunked]
ALL = [(name, chunks) for name in SCHEDULES for chunks in ((2, 3) if SCHEDULES[name].chunked else (1,))]


def simulated(
    name: str, stages: int, micro_batches: int, each: StageSeconds = ONE, chunks: int = 1
) -> Timeline:
    plan = even_plan(stages, micro_batches, chunks)
    return simulate(schedule_named(name, chunks), plan, [each] * stages * chunks)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_flushed_pipelines_have_the_textbook_bubble(name: str, stages: int, micro_batches: int) -> None:
    # Huang et al., GPipe, NeurIPS'19, sec. 2.3; Narayanan et al., SC'21, sec. 2.2.1
    formula = (stages - 1) / (micro_batches + stages - 1)
    assert simulated(name, stages, micro_batches).bubble == pytest.approx(formula, abs=1e-12)


def test_the_numbers_that_everybody_quotes() -> None:
    assert f"{simulated('gpipe', 4, 4).bubble:.1%}" == "42.9%"
    assert f"{simulated('gpipe', 4, 16).bubble:.1%}" == "15.8%"


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (4, 8), (4, 16), (8, 32)])
@pytest.mark.parametrize("each", [ONE, StageSeconds(2.0, 2.0, 1.0), StageSeconds(1.0, 1.25, 0.75)])
def test_zero_bubble_fills_the_drain(stages: int, micro_batches: int, each: StageSeconds) -> None:
    # Qi et al., ICLR'24, table 2: (p - 1) (T_F + T_B - T_W)
    timeline = simulated("zero-bubble", stages, micro_batches, each)
    work = micro_batches * (each.forward + each.input_gradient + each.weight_gradient)
    gap = (stages - 1) * (each.forward + each.input_gradient - each.weight_gradient)
    assert timeline.seconds == pytest.approx(work + gap, abs=1e-9)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 2), (2, 4), (4, 8), (4, 16), (8, 32)])
@pytest.mark.parametrize("chunks", [2, 4])
def test_chunks_shorten_fill_and_drain(stages: int, micro_batches: int, chunks: int) -> None:
    # Narayanan et al., SC'21, sec. 2.2.2: (p - 1) / v forwards and backwards of a worker's layers
    timeline = simulated("interleaved", stages, micro_batches, chunks=chunks)
    assert timeline.seconds == 3 * (micro_batches * chunks + stages - 1)
    warm_up = [2 * (stages - 1 - p) + (chunks - 1) * stages for p in range(stages)]
    assert list(timeline.peaks.values()) == [min(n + 1, micro_batches * chunks) for n in warm_up]


@pytest.mark.parametrize(("name", "chunks"), ALL)
def test_messages_that_take_their_time_cost_little(name: str, chunks: int) -> None:
    """No schedule takes up something long because something short is a moment late."""
    plan = even_plan(4, 16, chunks)
    slow = simulate(schedule_named(name, chunks), plan, [ONE] * 4 * chunks, message_seconds=0.001)
    assert 0.0 < slow.seconds - simulated(name, 4, 16, chunks=chunks).seconds < 0.05


def test_zero_bubble_is_faster_whatever_the_parts_take() -> None:
    for parts in ((1.0, 1.25, 0.75), (1.0, 0.75, 1.25), (2.0, 3.0, 0.5)):
        split = simulated("zero-bubble", 4, 16, StageSeconds(*parts)).seconds
        assert split < simulated("1f1b", 4, 16, StageSeconds(*parts)).seconds


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_peak_activations(stages: int, micro_batches: int) -> None:
    """GPipe keeps all, 1F1B one for every stage still to come, zero-bubble no more than 1F1B's first."""
    peaks = {name: list(simulated(name, stages, micro_batches).peaks.values()) for name in PLAIN}
    assert peaks["gpipe"] == [micro_batches] * stages
    assert peaks["1f1b"] == [min(stages - k, micro_batches) for k in range(stages)]
    assert max(peaks["zero-bubble"]) == peaks["1f1b"][0]


@given(
    which=st.sampled_from(ALL),
    groups=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    micro_batches=st.integers(1, 12),
    seconds=st.lists(st.tuples(*[st.integers(1, 5)] * 3), min_size=12, max_size=12),
    late=st.sampled_from([0.0, 0.25]),
)
def test_all_work_is_done_once_and_in_order(
    which: tuple[str, int],
    groups: list[int],
    micro_batches: int,
    seconds: list[tuple[int, int, int]],
    late: float,
) -> None:
    name, chunks = which
    plan = grouped(groups, micro_batches, chunks)
    stages = len(plan.stages)
    each = [StageSeconds(*three) for three in seconds[:stages]]
    timeline = simulate(schedule_named(name, chunks), plan, each, message_seconds=late)
    found = Counter((span.stage, span.micro_batch, span.work) for span in timeline.spans)
    backwards = [Work.INPUT_GRADIENT, Work.WEIGHT_GRADIENT] if name == "zero-bubble" else [Work.BACKWARD]
    wanted = [
        (k, m, work)
        for k in range(stages)
        for m in range(micro_batches)
        for work in [Work.FORWARD, *backwards]
    ]
    assert found == Counter(wanted)
    by_place = {(span.stage, span.micro_batch, span.work): span for span in timeline.spans}
    for (k, m, work), span in by_place.items():
        for before in inputs(k, m, work, stages - 1, backwards[0]):
            assert by_place[before].end <= span.begin
    for worker in plan.workers:
        mine = sorted((s for s in timeline.spans if s.worker == worker), key=lambda span: span.begin)
        assert all(one.end <= other.begin for one, other in pairwise(mine))


def inputs(k: int, m: int, work: Work, last: int, backward: Work) -> Iterator[tuple[int, int, Work]]:
    """What must have ended before."""
    if work is Work.FORWARD:
        if k > 0:
            yield k - 1, m, Work.FORWARD
    elif work is Work.WEIGHT_GRADIENT:
        yield k, m, Work.INPUT_GRADIENT
    else:
        yield k, m, Work.FORWARD
        if k < last:
            yield k + 1, m, backward


def grouped(groups: Sequence[int], micro_batches: int, chunks: int = 1) -> Plan:
    """One layer a stage, several workers and ``chunks`` stages a group."""
    starts = [sum(groups[:k]) for k in range(len(groups))]
    workers = [tuple(range(start, start + size)) for start, size in zip(starts, groups, strict=True)] * chunks
    stages = tuple(Stage(k, k + 1, group) for k, group in enumerate(workers))
    rows = tuple(deal_micro_batches([(w, 1.0) for w in stage.workers], micro_batches) for stage in stages)
    return Plan(0, stages, rows, ())


@pytest.mark.parametrize("groups", [[1, 1, 1, 1], [2, 2, 2], [3, 3]])
@pytest.mark.parametrize("micro_batches", [6, 12])
def test_it_agrees_with_the_planners_simulation(groups: list[int], micro_batches: int) -> None:
    plan = grouped(groups, micro_batches)
    each = [StageSeconds(1.0, 1.0, 1.0)] * len(groups)
    quick = simulate_step(plan, [1.0] * len(groups), [2.0] * len(groups), dict.fromkeys(plan.workers, 1.0))
    assert simulate(schedule_named("1f1b", 1), plan, each).seconds == quick


def test_a_slow_worker_takes_longer() -> None:
    plan = even_plan(2, 4)
    even = simulate(schedule_named("1f1b", 1), plan, [ONE, ONE])
    slow = simulate(schedule_named("1f1b", 1), plan, [ONE, ONE], {0: 0.5, 1: 1.0})
    assert slow.busy(0) == 2 * even.busy(0) and slow.busy(1) == even.busy(1)
    assert slow.seconds > even.seconds and slow.bubble > 0.0


def never_backward(place: Place, tallies: Sequence[Tally]) -> Iterator[Offer]:
    while not tallies[0].is_finished:
        yield (Instruction(Work.FORWARD),)


def test_a_deadlock_is_found() -> None:
    with pytest.raises(ValueError, match=r"deadlocks: worker 0 waits for forward and has 2 micro-batches"):
        simulate(never_backward, even_plan(2, 2), [ONE, ONE])


def test_too_many_activations_are_found() -> None:
    simulate(schedule_named("1f1b", 1), even_plan(4, 16), [ONE] * 4, room=4)
    with pytest.raises(ValueError, match="16 layers x micro-batches on worker 0, which has room for 4"):
        simulate(schedule_named("gpipe", 1), even_plan(4, 16), [ONE] * 4, room=4)


def test_spans_say_who_did_what() -> None:
    timeline = simulated("gpipe", 1, 1)
    assert timeline.spans == (Span(0, 0, 0, Work.FORWARD, 0.0, 1.0), Span(0, 0, 0, Work.BACKWARD, 1.0, 3.0))
    assert timeline.seconds == 3.0 and timeline.bubble == 0.0


def test_an_unknown_schedule_is_refused() -> None:
    names = "gpipe, 1f1b, interleaved, zero-bubble, skippipe"
    with pytest.raises(ValueError, match=f"'2f2b' is no schedule: choose one of {names}"):
        schedule_named("2f2b", 1)
    with pytest.raises(ValueError, match="gpipe has one chunk a worker, not 2: choose interleaved"):
        schedule_named("gpipe", 2)
    with pytest.raises(ValueError, match="interleaved needs chunks of at least 2, not 1"):
        schedule_named("interleaved", 1)
