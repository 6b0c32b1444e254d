from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.goodput import BADPUT, CAUSES, Ledger

SECOND = 1_000_000_000
TIMES = st.integers(0, 10**15)
ACTIONS = st.one_of(
    st.tuples(st.just("enter"), TIMES, st.sampled_from(CAUSES)),
    st.tuples(st.just("at"), TIMES),
    st.tuples(st.just("commit"), TIMES),
    st.tuples(st.just("waste"), TIMES),
    st.tuples(st.just("move"), st.sampled_from(CAUSES), st.sampled_from(CAUSES), TIMES),
)


@given(TIMES, st.lists(ACTIONS, max_size=40))
def test_the_parts_sum_to_the_wall_time_exactly(start: int, actions: list[tuple[object, ...]]) -> None:
    ledger, now = Ledger.begin(start), start
    for name, *arguments in actions:
        if name != "move":
            now += int(arguments[0])  # type: ignore[call-overload]
            arguments[0] = now
        ledger = getattr(ledger, str(name))(*arguments)
        assert sum(ledger.nanoseconds.values()) == ledger.total == now - start
        assert min(ledger.nanoseconds.values()) >= 0
        assert 0 <= ledger.committed <= ledger.nanoseconds["productive"]
        assert 0.0 <= ledger.goodput <= 1.0


def test_a_run_with_a_loss() -> None:
    ledger = Ledger.begin(5 * SECOND)
    ledger = ledger.enter(15 * SECOND, "productive")
    ledger = ledger.commit(45 * SECOND)
    # Seven seconds into the next step a worker is lost, noticed two seconds later.
    ledger = ledger.enter(54 * SECOND, "recovery_agree")
    ledger = ledger.move("productive", "recovery_detect", 2 * SECOND)
    ledger = ledger.waste(54 * SECOND)
    ledger = ledger.enter(55 * SECOND, "recovery_move").enter(58 * SECOND, "productive")
    ledger = ledger.commit(65 * SECOND)
    seconds = {cause: ns / 1e9 for cause, ns in ledger.nanoseconds.items() if ns}
    assert seconds == {
        "initialisation": 10.0,
        "productive": 37.0,
        "wasted_progress": 7.0,
        "recovery_detect": 2.0,
        "recovery_agree": 1.0,
        "recovery_move": 3.0,
    }
    assert ledger.goodput == 37 / 60
    assert ledger.committed == 37 * SECOND


def test_waste_takes_only_what_is_not_committed_and_move_takes_the_rest() -> None:
    ledger = Ledger.begin(0, "productive").commit(10).waste(14)
    assert (ledger.nanoseconds["productive"], ledger.nanoseconds["wasted_progress"]) == (10, 4)
    older = ledger.move("productive", "wasted_progress", 6)
    assert (older.nanoseconds["productive"], older.nanoseconds["wasted_progress"]) == (4, 10)
    assert ledger.move("productive", "paused", 99).nanoseconds["paused"] == 10


def test_a_ledger_is_a_value() -> None:
    first = Ledger.begin(0, "productive")
    first.at(10).waste(20)
    assert first.total == 0 and first.nanoseconds["productive"] == 0 and first.goodput == 0.0
    assert {"productive", *BADPUT} == set(CAUSES) and len(BADPUT) == len(CAUSES) - 1


def test_a_clock_that_runs_back_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="ran back"):
        Ledger.begin(10).at(9)
