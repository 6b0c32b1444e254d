"""Who is given up, and who is not: heartbeats, stuck calls, disputes."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from runtime.detection import GAPS, LONGEST_GAPS, MOST, Disputes, Patience, Watch, link, to_fence

PATIENCE = Patience(beat_seconds=0.1, silence_seconds=1.0, stuck_seconds=5.0, stuck_steps=5.0)


def watched(workers: int, until: float, *, silent_from: dict[int, float] | None = None) -> Watch:
    """``workers`` beat ten times a second until ``until``; some fall silent before."""
    watch = Watch(PATIENCE)
    for tenth in range(round(until * 10) + 1):
        now = tenth / 10
        for worker in range(workers):
            if now <= (silent_from or {}).get(worker, until):
                watch.beat(worker, tenth, 0.0, now)
        watch.tick(now)
    return watch


def test_regular_heartbeats_are_enough() -> None:
    watch = watched(4, 20.0)
    assert watch.overdue(20.9, 0.1) == []


def test_silence_is_found_within_its_limit() -> None:
    watch = watched(4, 3.0, silent_from={2: 2.0})
    assert watch.overdue(2.9, 0.1) == []
    ((worker, reason),) = watch.overdue(3.05, 0.1)
    assert worker == 2 and reason.startswith("no sign of life for 1.")


def test_late_heartbeats_of_anybody_make_patient() -> None:
    watch = Watch(PATIENCE)
    for now in (0.0, 0.7, 1.4):
        for worker in (0, 1, 2):
            watch.beat(worker, 0, 0.0, now)
        watch.tick(now)
    assert watch.patience() == LONGEST_GAPS * 0.7
    assert watch.overdue(1.4 + 2.5, 0.1) == []


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=4 * GAPS))
def test_patience_follows_the_longest_recent_gap(gaps: list[float]) -> None:
    watch, now = Watch(PATIENCE), 0.0
    watch.beat(0, 0, 0.0, now)
    seen = []
    for gap in gaps:
        before, now = now, now + gap
        seen.append(now - before)
        watch.beat(0, 0, 0.0, now)
        longest = max(seen[-GAPS:])
        assert watch.patience() == min(max(1.0, LONGEST_GAPS * longest), MOST * 1.0)


def test_most_of_them_silent_at_once_is_rather_the_network() -> None:
    watch = watched(4, 1.0)
    assert watch.overdue(2.5, 0.1) == []
    assert [worker for worker, _ in watch.overdue(1.0 + MOST + 0.1, 0.1)] == [0, 1, 2, 3]


def test_time_that_this_process_slept_counts_for_nobody() -> None:
    watch = watched(2, 1.0)
    watch.tick(60.0)
    assert watch.overdue(60.5, 0.1) == []
    assert [worker for worker, _ in watch.overdue(61.5, 0.1)] == [0, 1]


def test_a_stuck_call_is_measured_by_the_median_step() -> None:
    watch = Watch(PATIENCE)
    watch.beat(0, 7, 6.0, 0.0)
    watch.beat(1, 7, 0.0, 0.0)
    assert watch.overdue(0.1, step_seconds=10.0) == []
    assert watch.overdue(0.1, step_seconds=0.1) == [(0, "stuck in one call for 6.0 s")]


def test_a_standstill_is_noticed_and_given_time() -> None:
    watch = Watch(PATIENCE)
    for tenth in range(60):
        watch.beat(0, 1 if tenth < 10 else 2, 0.0, tenth / 10)
    assert not watch.stalled(2.5, 0.1) and watch.stalled(5.9, 0.1)
    assert not watch.stalled(5.9, 10.0), "a step takes longer than that"
    watch.stirred(5.9)
    assert not watch.stalled(7.0, 0.1)


LINKS = st.sets(st.sampled_from(list(combinations(range(6), 2))))


@given(LINKS, st.sets(st.integers(0, 5)))
def test_no_broken_link_is_left_between_two_that_stay(
    broken: set[tuple[int, int]], members: set[int]
) -> None:
    fenced = set(to_fence(broken, members))
    assert fenced <= members
    assert not any({one, other} <= members - fenced for one, other in broken)
    for worker in fenced:  # nobody goes for nothing
        assert any(worker in pair and set(pair) <= members for pair in broken)


@given(st.integers(0, 5))
def test_a_worker_cut_off_from_all_goes_alone(worker: int) -> None:
    broken = [link(worker, other) for other in range(6) if other != worker]
    assert to_fence(broken, range(6)) == [worker]


def always(worker: int, moment: float) -> bool:
    return True


def test_a_dispute_is_heard_before_it_is_settled() -> None:
    disputes = Disputes(PATIENCE)
    disputes.accuse(0, 1, 10.0)
    assert disputes.due(10.1, range(3), always) == []
    disputes.accuse(2, 1, 10.15)
    assert disputes.due(10.25, range(3), always) == [1]
    assert disputes.due(99.0, range(3), always) == []


def test_nobody_goes_in_the_place_of_one_who_may_be_gone() -> None:
    """A killed worker's peers know of it before the controller does, on a busy machine long before."""
    disputes, watch = Disputes(PATIENCE), Watch(PATIENCE)
    for worker in range(3):
        watch.beat(worker, 1, 0.0, 10.0)
    disputes.accuse(2, 1, 10.01)
    for worker in (0, 2):
        watch.beat(worker, 2, 0.0, 10.2)
    assert disputes.due(10.35, range(3), watch.heard_since) == []
    late = Disputes(PATIENCE)
    late.accuse(2, 1, 10.01)
    watch.beat(1, 2, 0.0, 10.36)
    assert late.due(10.4, range(3), watch.heard_since) == [2], "both are there, and cannot reach each other"
    watch.forget(1)
    disputes.forget(1)
    assert disputes.due(10.4, (0, 2), watch.heard_since) == []


def test_whoever_is_gone_has_no_disputes() -> None:
    disputes = Disputes(PATIENCE)
    disputes.accuse(0, 1, 10.0)
    disputes.forget(1)
    assert disputes.due(99.0, range(3), always) == []
