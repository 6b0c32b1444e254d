"""The controller's transitions, one event at a time: no thread, no clock, no message."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.checkpoint import ShardFile
from runtime.control.state import Phase
from runtime.events import (
    FaultInjected,
    Paused,
    Recovered,
    RunStarted,
    StepRepeated,
    WorkerLost,
)
from runtime.parts import covers
from runtime.protocol import (
    Failing,
    Finished,
    Held,
    Injecting,
    Interrupt,
    Leave,
    Linked,
    Measured,
    Moved,
    PeerLost,
    Repeated,
    Resume,
    Stepped,
    Stop,
    Unwritten,
    Written,
)
from runtime.resharding import Holding
from runtime.signals import (
    CommandsSent,
    Committed,
    Durable,
    End,
    Lost,
    ManifestWritten,
    Note,
    StopRequested,
    Tick,
)
from tests.support.controlled import LAYOUT, Run, holdings, notes, of, record, sent


def test_the_run_starts_when_all_have_joined() -> None:
    run = Run()
    assert run.join(0, 1) == []
    outputs = run.join(2)
    (started,) = notes(outputs, RunStarted)
    assert (started.workers, started.stages, started.from_version, started.source) == (3, 1, 0, "initial")
    resumes = sent(outputs, Resume)
    assert set(resumes) == {0, 1, 2}
    assert len({id(resume.plan) for resume in resumes.values()}) == 1
    resume = resumes[0]
    assert (resume.version, resume.source, resume.exponents, resume.stop_at) == (0, "initial", None, 9)
    assert resume.addresses == {0: "at 0", 1: "at 1", 2: "at 2"} and resume.transfers == ()
    assert resume.plan.generation == run.controller.generation == 1


def test_the_run_starts_from_a_checkpoint() -> None:
    outputs = Run(start=Durable(4, "there", (3,))).join(0, 1, 2)
    (started,) = notes(outputs, RunStarted)
    assert (started.from_version, started.source) == (4, "checkpoint")
    resume = sent(outputs, Resume)[2]
    assert (resume.version, resume.source, resume.exponents, resume.checkpoint) == (
        4,
        "checkpoint",
        (3,),
        "there",
    )


def test_a_loss_while_forming_is_not_waited_for() -> None:
    run = Run()
    run.join(0)
    outputs = run.tell(Lost(2, "never placed"))
    assert [event.worker for event in notes(outputs, WorkerLost)] == [2]
    assert not sent(outputs, Resume)
    assert set(sent(run.join(1), Resume)) == {0, 1}


def test_a_member_lost_while_forming_takes_no_part() -> None:
    run = Run()
    run.join(0, 1)
    run.tell(Lost(1, "died"))
    assert set(sent(run.join(2), Resume)) == {0, 2}


def test_too_few_started() -> None:
    run = Run(min_workers=3)
    run.join(0, 1)
    (end,) = of(run.tell(Lost(2, "never placed")), End)
    assert end.outcome == "failed" and "only 2 of 3 workers started" in end.message
    assert "parallel.min_workers (3)" in end.message


def test_a_stop_while_forming() -> None:
    run = Run()
    run.join(0)
    outputs = run.tell(StopRequested())
    assert of(outputs, End) == [End("interrupted", "stopped before the first step")]
    assert set(sent(outputs, Leave)) == {0}


# --- losses ---------------------------------------------------------------------------------


def test_a_loss_interrupts_agrees_and_goes_on() -> None:
    run = Run().form()
    run.tell(Measured(0, 3, {}, {}))
    outputs = run.tell(Lost(1, "process died"))
    assert notes(outputs, WorkerLost) == [WorkerLost(4, 1, "process died")]
    assert sent(outputs, Leave)[1].reason.startswith("fenced out")
    assert sent(outputs, Interrupt) == {0: Interrupt(2, (1,)), 2: Interrupt(2, (1,))}
    assert run.controller.phase is Phase.AGREEING
    assert run.holds(0, 2, 3) == []
    outputs = run.holds(2, 2, 3)
    resumes = sent(outputs, Resume)
    assert set(resumes) == {0, 2}
    assert (resumes[0].version, resumes[0].source, resumes[0].exponents) == (3, "peers", (3,))
    assert resumes[0].plan.generation == 2 and resumes[0].plan.workers == (0, 2)
    assert all({t.source, t.target} <= {0, 2} for t in resumes[0].transfers)
    assert run.controller.plan == resumes[0].plan
    run.tell(CommandsSent())
    assert run.tell(Moved(0, 2, 0.1, 100)) == []
    (recovered,) = notes(run.tell(Moved(2, 2, 0.1, 50)), Recovered)
    assert (recovered.lost, recovered.workers_before, recovered.workers_after) == ((1,), 3, 2)
    assert (recovered.step, recovered.from_version, recovered.source) == (4, 3, "peers")
    assert recovered.moved_bytes == 150
    seconds = recovered.seconds
    assert (seconds.agree, seconds.plan, seconds.move, seconds.redo) == (2.0, 1.0, 2.0, 0.5)


def test_a_lost_workers_link_counts_no_more() -> None:
    run = Run().form()
    for worker, rate in enumerate((1e9, 2e9, 3e9)):
        run.tell(Linked(worker, (worker + 1) % 3, 1e-4, rate))
    assert run.controller.speeds.bytes_per_second == 2e9
    run.tell(Lost(0, "died"))
    run.tell(Lost(1, "died"))
    run.tell(Linked(0, 1, 1e-4, 1e9))
    assert run.controller.speeds.bytes_per_second == 3e9


def test_the_newest_version_that_is_whole_counts() -> None:
    run = Run().form()
    plan = run.controller.plan
    assert plan is not None
    run.tell(Lost(1, "died"))
    run.holds(0, 3, 4)
    # units 0, 2 are with worker 0; unit 1 (owner: the dead worker) only with worker 2, and only at 3
    held = Held(2, 2, (*holdings(plan, 2, [3]), Holding(0, 128, 192, 4)), {0: 4}, {3: (3,), 4: (4,)}, {})
    assert sent(run.tell(held), Resume)[0].version == 3


def test_a_loss_while_agreeing_starts_over() -> None:
    run = Run(workers=4).form()
    plan = run.controller.plan
    run.tell(Lost(3, "died"))
    run.holds(0, 1)
    run.holds(1, 1)
    outputs = run.tell(Lost(2, "died too"))
    assert sent(outputs, Interrupt) == {0: Interrupt(3, (2, 3)), 1: Interrupt(3, (2, 3))}
    stale = Held(0, 2, (), {}, {}, {})
    assert run.tell(stale) == [] and run.controller.phase is Phase.AGREEING
    run.holds(0, 1, plan=plan)
    outputs = run.holds(1, 1, plan=plan)
    assert set(sent(outputs, Resume)) == {0, 1}
    run.tell(Moved(0, 3, 0.1, 0))
    (recovered,) = notes(run.tell(Moved(1, 3, 0.1, 0)), Recovered)
    assert recovered.lost == (3, 2) and (recovered.workers_before, recovered.workers_after) == (4, 2)


def test_a_loss_while_moving_belongs_to_the_same_incident() -> None:
    run = Run(workers=4).form()
    run.tell(Lost(3, "died"))
    for worker in (0, 1, 2):
        run.holds(worker, 1)
    assert run.tell(Moved(0, 2, 0.1, 10)) == []
    run.tell(Lost(1, "died"))
    assert run.tell(Moved(2, 2, 0.1, 10)) == [], "of the generation that was cut short"
    for worker in (0, 2):
        outputs = run.tell(Held(worker, 3, (Holding(0, 0, 192, 1),), {0: 1}, {1: (1,)}, {}))
    assert set(sent(outputs, Resume)) == {0, 2}
    run.tell(Moved(0, 3, 0.1, 5))
    (recovered,) = notes(run.tell(Moved(2, 3, 0.1, 5)), Recovered)
    assert recovered.lost == (3, 1) and (recovered.workers_before, recovered.workers_after) == (4, 2)


def test_a_later_loss_is_an_incident_of_its_own() -> None:
    run = Run().form()
    for lost, left in ((2, (0, 1)), (1, (0,))):
        run.tell(Lost(lost, "died"))
        for worker in left:
            run.tell(Held(worker, run.controller.generation, (Holding(0, 0, 192, 1),), {0: 1}, {1: (1,)}, {}))
        for worker in left:
            outputs = run.tell(Moved(worker, run.controller.generation, 0.1, 0))
        (recovered,) = notes(outputs, Recovered)
        assert recovered.lost == (lost,)


def test_the_same_loss_is_heard_once() -> None:
    run = Run().form()
    assert run.tell(Lost(1, "process died"))
    assert run.tell(Lost(1, "process died")) == []
    assert run.tell(PeerLost(0, 1, "reset")) == []
    assert run.controller.generation == 2


def test_a_link_that_stays_broken_costs_one_of_its_ends() -> None:
    run = Run().form()
    assert run.tell(PeerLost(0, 2, "connection reset")) == []
    outputs = run.tell(Tick())
    (lost,) = notes(outputs, WorkerLost)
    assert lost.worker == 2 and lost.reason == "cut off from other workers"
    assert set(sent(outputs, Interrupt)) == {0, 1}


def test_a_broken_link_to_a_stranger_is_nothing() -> None:
    assert Run().form().tell(PeerLost(0, 17, "reset")) == []


@pytest.mark.parametrize(
    "report",
    [
        Held(1, 2, (Holding(0, 0, 192, 8),), {0: 8}, {8: (8,)}, {}),
        Moved(1, 2, 0.1, 0),
        Stepped(1, record(1)),
        Measured(1, 8, {0: 1.0}, {0: 1.0}),
        PeerLost(1, 0, "I cannot see it"),
        Failing(1, "nonsense"),
        Finished(1, 2, 9),
        Written(1, 1, 1, None, ShardFile("x", "0", 1, ((0, 0, 192),))),
        Repeated(1, 1, 2),
        Unwritten(1, 1, "disk full"),
        Injecting(1, 1, "forward", "SIGKILL", 0.0),
    ],
    ids=lambda report: type(report).__name__,
)
def test_a_fenced_worker_is_not_listened_to(report: Any) -> None:
    run = Run().form()
    run.tell(Lost(1, "hung"))
    before = (run.controller.phase, run.controller.generation, dict(run.controller.members))
    assert run.tell(report) == []
    assert (run.controller.phase, run.controller.generation, dict(run.controller.members)) == before


def test_state_beyond_the_survivors_comes_from_the_checkpoint() -> None:
    run = Run().form()
    run.tell(ManifestWritten(Durable(2, "there", (2,))))
    run.step(1), run.step(2), run.step(3)
    run.tell(Lost(0, "died"))
    run.tell(Lost(1, "died"))
    outputs = run.holds(2, 4, 5)
    resume = sent(outputs, Resume)[2]
    assert (resume.version, resume.source, resume.checkpoint, resume.exponents) == (
        2,
        "checkpoint",
        "there",
        (2,),
    )
    (recovered,) = notes(run.tell(Moved(2, 3, 0.1, 0)), Recovered)
    assert (recovered.source, recovered.from_version) == ("checkpoint", 2)
    assert of(run.step(3, worker=2), Committed), "steps after the checkpoint are recorded anew"


def test_without_a_checkpoint_the_run_begins_again() -> None:
    run = Run().form()
    run.tell(Lost(0, "died"))
    run.tell(Lost(1, "died"))
    resume = sent(run.holds(2, 4), Resume)[2]
    assert (resume.version, resume.source, resume.exponents) == (0, "initial", None)


def test_everybody_lost() -> None:
    run = Run(workers=2).form()
    run.tell(Lost(0, "died"))
    (end,) = of(run.tell(Lost(1, "died")), End)
    assert end.outcome == "failed" and "--resume" in end.message
    assert run.controller.phase is Phase.ENDED


# --- pausing and stopping -------------------------------------------------------------------


def paused() -> Run:
    run = Run(min_workers=3).form()
    run.tell(Measured(0, 4, {}, {}))
    run.tell(Lost(2, "died"))
    run.holds(0, 4)
    outputs = run.holds(1, 4)
    assert outputs == [Note(Paused(5, 2, 3))]
    assert run.controller.phase is Phase.PAUSED
    return run


def test_a_stop_while_paused_writes_what_is_held() -> None:
    run = paused()
    resumes = sent(run.tell(StopRequested()), Resume)
    assert set(resumes) == {0, 1}
    assert resumes[0].version == resumes[0].stop_at == 4, "no step is computed, the checkpoint is written"


def test_a_loss_while_paused_is_agreed_on_anew() -> None:
    run = paused()
    outputs = run.tell(Lost(1, "died"))
    assert set(sent(outputs, Interrupt)) == {0} and run.controller.phase is Phase.AGREEING
    outputs = run.tell(Held(0, 3, (Holding(0, 0, 192, 4),), {0: 4}, {4: (4,)}, {}))
    assert outputs == [Note(Paused(5, 1, 3))]


def test_a_stop_while_running_is_passed_on_once() -> None:
    run = Run().form()
    assert sent(run.tell(StopRequested()), Stop) == {0: Stop(), 1: Stop(), 2: Stop()}
    assert run.tell(StopRequested()) == []


def test_a_loss_while_stopping_goes_no_further() -> None:
    run = Run(min_workers=3).form()
    run.tell(StopRequested())
    run.tell(Lost(2, "died"))
    run.holds(0, 4)
    resume = sent(run.holds(1, 4), Resume)[0]
    assert resume.version == resume.stop_at == 4, "too few are left to train, but not to write"


# --- records and checkpoints ----------------------------------------------------------------


def test_a_step_is_recorded_once() -> None:
    run = Run().form()
    assert of(run.step(1), Committed) == [Committed(record(1))]
    assert run.step(1) == [] and run.step(1, worker=2) == []
    assert of(run.step(2, worker=1), Committed) == [Committed(record(2))]


def test_a_record_of_a_later_generation_is_not_believed() -> None:
    assert Run().form().step(1, generation=2) == []


def test_a_failing_worker_ends_the_run() -> None:
    run = Run().form()
    outputs = run.tell(Failing(1, "step 3: the gradient of 0.weight is not finite"))
    assert of(outputs, End) == [End("failed", "worker 1: step 3: the gradient of 0.weight is not finite")]
    assert set(sent(outputs, Leave)) == {0, 1, 2}


def test_repeats_and_faults_are_noted() -> None:
    run = Run().form()
    assert run.tell(Repeated(0, 3, 2)) == [Note(StepRepeated(3, 2))]
    assert run.tell(Injecting(1, 3, "reduce", "SIGKILL", 5.0)) == [
        Note(FaultInjected(3, 1, "reduce", "SIGKILL"))
    ]


def test_an_ended_run_listens_to_nobody() -> None:
    run = Run().form()
    run.tell(Failing(1, "over"))
    for event in (
        Lost(0, "died"),
        StopRequested(),
        Stepped(0, record(1)),
        CommandsSent(),
        Failing(0, "again"),
    ):
        assert run.tell(event) == []


def test_covers() -> None:
    assert covers(LAYOUT, [(0, 0, 64), (0, 64, 192)])
    assert covers(LAYOUT, [(0, 0, 128), (0, 64, 192)])
    assert not covers(LAYOUT, [(0, 0, 64), (0, 128, 192)])
    assert not covers(LAYOUT, [(0, 64, 192)])
    assert not covers(LAYOUT, [])
