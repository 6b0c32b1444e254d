"""A person asks for more or fewer workers: what is allowed, who leaves, what the controller does about it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.controller import Controller
from runtime.events import DrainNotice, Resized, WorkerLeft, WorkerLost
from runtime.plan import Member, Plan
from runtime.protocol import Change, Injecting, Leave, Linked, Measured, Moved, Resume, Settled
from runtime.salvage import Salvage
from runtime.signals import Dismiss, End, Hire, Joined, Learn, Lost, Output, Resize, StopRequested, Terms
from runtime.sizing import problem_of_size, surplus
from tests.support.controlled import LAYOUT, Run, choose, notes, of, sent


@pytest.mark.parametrize("workers", [2, 3, 6])
def test_a_size_within_the_recipes_bounds_is_allowed(workers: int) -> None:
    assert problem_of_size(workers, 2, 3, 6) is None


@pytest.mark.parametrize(
    ("workers", "most", "said"),
    [
        (7, 6, "parallel.max_workers is 6: name a number from 2 to 6"),
        (1, 6, "parallel.min_workers is 2: name a number from 2 to 6"),
        (4, None, "its recipe begins with 3 and gives no parallel.max_workers: name a number from 2 to 3"),
    ],
)
def test_a_size_out_of_bounds_is_refused_in_a_sentence(workers: int, most: int | None, said: str) -> None:
    problem = problem_of_size(workers, 2, 3, most)
    assert problem == f"the run cannot have {workers} workers, because {said}"


def test_where_only_one_size_is_allowed_it_is_named() -> None:
    assert (problem_of_size(3, 2, 2, None) or "").endswith("name 2")


@pytest.mark.parametrize(
    ("domains", "at_work", "keep", "gone"),
    [
        ("aabb", {0, 1, 2, 3}, 4, ()),
        ("aabb", {0, 1, 2, 3}, 3, (3,)),
        ("aabb", {0, 1, 2, 3}, 2, (1, 3)),  # one on each: a backup in another domain
        ("aaabb", {0, 1, 2, 3, 4}, 2, (1, 2, 4)),
        ("aabbc", {0, 1, 2, 3, 4}, 4, (4,)),  # the smallest domain is emptied
        ("aabbcc", {0, 1, 2, 3, 4, 5}, 4, (4, 5)),
        ("aabb", {0, 1, 2}, 3, (3,)),
        ("abcd", {1, 2, 3}, 3, (0,)),  # whoever has no work goes first
        ("ab", {0, 1}, 1, (1,)),
        ("aa", {0, 1}, 0, (0, 1)),
    ],
)
def test_who_leaves(domains: str, at_work: set[int], keep: int, gone: tuple[int, ...]) -> None:
    assert surplus(dict(enumerate(domains)), at_work, keep) == gone


@given(
    st.dictionaries(st.integers(0, 30), st.sampled_from("abcd"), max_size=12), st.integers(0, 12), st.data()
)
def test_as_many_stay_as_are_wanted_and_two_domains_if_possible(
    domains: dict[int, str], keep: int, data: Any
) -> None:
    gone = surplus(domains, set(domains), keep)
    staying = {worker: domains[worker] for worker in domains if worker not in gone}
    assert len(staying) == min(keep, len(domains)) and len(set(gone)) == len(gone)
    if keep >= 2 and len(set(domains.values())) >= 2:
        assert len(set(staying.values())) >= 2


def run_of(workers: int, most: int | None, *, spares: int = 0, aim: int | None = None) -> Run:
    """All joined, under way, settled."""
    run = Run(workers)
    terms = Terms("r", LAYOUT, 9, workers, 1, max_workers=most, spares=spares, aim=aim)
    run.controller = Controller(terms, choose)
    run.join(*range(workers))
    settle(run)
    return run


def settle(run: Run) -> list[Output]:
    """Everybody in the newest plan, and those who leave it, have gone over to it."""
    plan, change = run.controller.plan, run.controller._change
    concerned = change.concerned if change else (plan.workers if plan else ())
    outputs: list[Output] = []
    for worker in concerned:
        if change:
            outputs += run.tell(Moved(worker, run.controller.generation, 0.0, 0))
    for worker in concerned:
        outputs += run.tell(Settled(worker, run.controller.generation))
    return outputs


def test_a_larger_size_asks_for_workers() -> None:
    run = run_of(3, None)
    assert not of(run.tell(Lost(2, "process died")), Hire)
    run = run_of(2, 4, aim=2)
    outputs = run.tell(Resize(4))
    assert [hire.worker for hire in of(outputs, Hire)] == [2, 3]
    assert notes(outputs, Resized) == [Resized(1, 4)]
    assert set(sent(run.join(2), Change)) == {0, 1, 2}


def test_the_same_size_again_changes_nothing() -> None:
    run = run_of(3, 4, aim=3)
    assert run.tell(Resize(3)) == []


def test_a_smaller_size_has_the_others_leave_at_a_step_boundary() -> None:
    run = run_of(4, 4)
    outputs = run.tell(Resize(2))
    assert [notice.worker for notice in notes(outputs, DrainNotice)] == [2, 3]
    changes = sent(outputs, Change)
    assert set(changes) == {0, 1, 2, 3} and changes[0].plan.workers == (0, 1)
    outputs = settle(run)
    assert {(left.worker, left.reason) for left in notes(outputs, WorkerLeft)} == {
        (2, "the run was resized to 2"),
        (3, "the run was resized to 2"),
    }
    assert set(sent(outputs, Leave)) == {2, 3} and not notes(outputs, WorkerLost)
    assert not of(outputs, Hire), "nobody is asked for in their place"
    lost = run.tell(Lost(1, "process died"))
    assert [hire.worker for hire in of(lost, Hire)] == [4], "a lost one is replaced, up to the new size"


def test_a_spare_stays_a_spare_and_comes_in_when_more_are_wanted() -> None:
    run = run_of(3, 3, spares=1)
    assert not sent(run.join(3), Change), "it stands by"
    run.tell(Resize(2))
    outputs = settle(run)
    assert run.controller.plan is not None and len(run.controller.plan.workers) == 2
    assert len(run.controller.members) == 3, outputs
    changes = sent(run.tell(Resize(3)), Change)
    assert changes and len(next(iter(changes.values())).plan.workers) == 3


def test_who_is_on_the_way_and_no_longer_wanted_is_sent_back() -> None:
    run = run_of(2, 4)
    first, second = sorted(run.controller._hiring.starting)
    outputs = run.tell(Resize(2))
    assert [dismiss.worker for dismiss in of(outputs, Dismiss)] == [second, first]
    late = run.tell(Joined(first, "node", "at", [1.0], [2.0]))
    assert [dismiss.worker for dismiss in of(late, Dismiss)] == [first], "it had been ready in that moment"
    assert run.tell(Lost(second, "ended")) == [], "nothing to tell of it"
    assert [hire.worker for hire in of(run.tell(Resize(3)), Hire)] == [4], "an id is never used twice"


def test_a_size_asked_for_before_the_start_holds_from_the_start() -> None:
    run = Run(3)
    run.controller = Controller(Terms("r", LAYOUT, 9, 3, 1, max_workers=4), choose)
    run.join(0, 1)
    assert notes(run.tell(Resize(2)), Resized)
    outputs = run.join(2)
    assert set(sent(outputs, Resume)) == {0, 1} and not of(outputs, Hire)
    assert set(sent(settle(run), Leave)) == {2}


def test_a_new_controller_is_told_the_size_that_was_asked_for() -> None:
    run = Run(3)
    run.controller = Controller(Terms("r", LAYOUT, 9, 3, 1, max_workers=4, aim=2, next_worker=5), choose)
    run.tell(Learn((), 0, 0.5, 5))
    assert run.controller.aim == 2
    run = run_of(3, 4, aim=2)
    assert run.controller.plan is not None and len(run.controller.plan.workers) == 2


def test_a_run_that_is_being_stopped_is_not_resized() -> None:
    run = run_of(3, 4)
    run.tell(StopRequested())
    assert run.tell(Resize(2)) == []


def test_after_a_loss_those_who_are_to_leave_get_no_work() -> None:
    run = run_of(4, 4)
    run.tell(Lost(0, "process died"))
    outputs = run.tell(Resize(2))
    assert [notice.worker for notice in notes(outputs, DrainNotice)] == [3]
    plan = run.controller.plan
    for worker in (1, 2, 3):
        outputs = run.holds(worker, 0, plan=plan)
    assert run.controller.plan is not None and set(run.controller.plan.workers) == {1, 2}


def test_those_who_are_to_leave_stay_while_too_few_would_be_left() -> None:
    """A loss comes before the change: the interrupted step is finished by who is left of those at work."""
    run = Run(4, min_workers=2)
    terms = Terms("r", LAYOUT, 9, 4, 2, max_workers=4)

    def finish(generation: int, *_: Any) -> tuple[Plan, Salvage]:
        return choose(generation, [Member(0, "node-0")], run.controller.speeds, None), Salvage(
            5, frozenset({0}), ({},)
        )

    run.controller = Controller(terms, choose, mend_plan=finish)
    run.join(*range(4))
    settle(run)
    run.tell(Resize(2))
    run.tell(Lost(1, "process died"))
    for worker in (0, 2, 3):
        run.holds(worker, 4)
    assert run.controller.plan is not None and run.controller.plan.workers == (0,)
    run.tell(Moved(0, run.controller.generation, 0.0, 0))
    outputs = settle(run)
    assert [left.worker for left in notes(outputs, WorkerLeft)] == [3]
    assert sent(outputs, Change)[0].plan.workers == (0, 2)


def test_a_run_that_is_being_stopped_ends_with_its_last_worker() -> None:
    run = run_of(1, 2)
    run.tell(StopRequested())
    (end,) = of(run.tell(Lost(0, "process died")), End)
    assert (end.outcome, end.message) == ("interrupted", "stopped while there was no worker")


@pytest.mark.parametrize("how", [Lost(3, "process died"), Resize(3)])
def test_nothing_is_kept_by_the_id_of_a_worker_that_is_gone(how: Lost | Resize) -> None:
    """Or a run whose workers come and go for months would grow with each."""
    run = run_of(4, 4)
    run.tell(Measured(3, 1, {0: 1.0}, {0: 1.0}))
    run.tell(Linked(3, 0, 1e-4, 1e9))
    if isinstance(how, Lost):
        run.tell(Injecting(3, 1, "forward", "SIGKILL", 1.0))
    run.tell(how)
    if isinstance(how, Resize):
        settle(run)
    assert 3 not in run.controller.members
    state = {**vars(run.controller), **vars(run.controller.speeds)}
    assert not [name for name, kept in state.items() if isinstance(kept, dict) and 3 in kept]
