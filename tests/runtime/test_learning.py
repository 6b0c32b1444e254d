"""What a controller that was started anew concludes from its workers' answers."""

from __future__ import annotations

from typing import Any

from runtime.controller import LEARNING_SECONDS, Controller
from runtime.events import WorkerLeft
from runtime.plan import Member
from runtime.protocol import Here, Leave, Leaving, Linked, Settled
from runtime.signals import End, Learn, Output, Terms, Tick
from runtime.speeds import Speeds
from tests.support.controlled import LAYOUT, choose, notes, of, sent

PLAN = choose(2, [Member(0, "a"), Member(1, "b")], Speeds(), None)


def restarted(**here: Any) -> tuple[Controller, list[Output]]:
    """Workers 0 and 1 follow ``PLAN``; 2 has no part in it any more and is to leave."""
    controller = Controller(Terms("r", LAYOUT, 9, 3, 1, None), choose)
    controller.handle(Learn((0, 1, 2), 4, 0.5, 3), 0.0)
    outputs: list[Output] = []
    for worker, plan, changes in ((2, None, {}), (0, PLAN, {}), (1, PLAN, here)):
        answer = Here(worker, f"at {worker}", f"node-{worker}", (1.0,), (2.0,), 2, plan, version=4, **changes)
        outputs += controller.handle(answer, 1.0)
        if worker == 2:  # as a worker tells again right after it has said where it stands
            outputs += controller.handle(Leaving(2, "SIGTERM"), 1.0)
    return controller, outputs


def test_a_leaver_that_owes_nothing_is_let_go() -> None:
    _, outputs = restarted()
    assert list(sent(outputs, Leave)) == [2]
    assert [note.worker for note in notes(outputs, WorkerLeft)] == [2]


def test_a_leaver_stays_until_nobody_waits_for_its_state() -> None:
    controller, outputs = restarted(settled=False)
    assert not sent(outputs, Leave)
    controller.handle(Linked(2, 0, 1e-4, 1e9), 2.0)
    assert controller.speeds.bytes_per_second == 1e9
    assert not sent(controller.handle(Settled(0, 2), 3.0), Leave)
    assert list(sent(controller.handle(Settled(1, 2), 4.0), Leave)) == [2]
    assert controller.speeds.bytes_per_second is None, "its link went with it"


def test_a_run_that_ends_before_it_began_asks_for_nobody() -> None:
    """Too few of the first workers are left when they have had their time to answer."""
    controller = Controller(Terms("r", LAYOUT, 9, 3, 3, None, max_workers=4), choose)
    controller.handle(Learn((0, 1, 2), 0, 0.5, 3), 0.0)
    for worker in (0, 1):
        controller.handle(Here(worker, f"at {worker}", "a", (1.0,), (2.0,), 0), 0.5)
    controller.handle(Tick(), 1.0)
    outputs = controller.handle(Tick(), LEARNING_SECONDS + 0.5)
    (end,) = of(outputs, End)
    assert end.outcome == "failed" and "only 2 of 3 workers started" in end.message
    assert outputs[-1] == end, "nothing comes after the end"
