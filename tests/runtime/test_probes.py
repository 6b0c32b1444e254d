"""Where nothing moves any more, workers are asked whom they hear."""

from __future__ import annotations

from runtime.control.state import Phase
from runtime.controller import GREETING_SECONDS, PROBE_SECONDS
from runtime.protocol import Beat, Finished, Probe
from runtime.signals import Tick
from tests.support.controlled import Run, sent


def stalled(run: Run) -> dict[int, Probe]:
    """Everybody lives and nobody moves; who is then asked whom it hears, with what."""
    asked: dict[int, Probe] = {}
    for _ in range(4):
        for worker in run.controller.members:
            run.tell(Beat(worker, 5, 0.0))
        asked |= sent(run.tell(Tick()), Probe)
    return asked


def test_where_nothing_moves_all_are_asked_whom_they_hear() -> None:
    asked = stalled(Run().form())
    assert set(asked) == {0, 1, 2}
    assert {(probe.peers, probe.seconds) for probe in asked.values()} == {((0, 1, 2), PROBE_SECONDS)}


def test_many_have_longer_to_greet_each_other() -> None:
    run = Run(workers=100)
    for worker in range(100):
        run.now = 0.0
        run.join(worker)
    asked: dict[int, Probe] = {}
    while not asked:
        run.tell(Beat(0, 5, 0.0))
        asked = sent(run.tell(Tick()), Probe)
    assert {probe.seconds for probe in asked.values()} == {100 * GREETING_SECONDS}


def test_nobody_moves_who_waits_for_the_last_checkpoint() -> None:
    run = Run().form()
    for worker in range(3):
        run.tell(Finished(worker, 1, 9))
    assert run.controller.phase is Phase.RUNNING
    assert stalled(run) == {}
