"""What a chaos run does and when, what is said of it afterwards, and that nobody stays stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from actors.local_cluster import SLOT
from jobs.chaos import WITHOUT_END, _at_most, for_chaos
from jobs.chaos_plan import KINDS, QUIET_END, Done, account, schedule
from jobs.chaos_strikes import Processes, watched_processes
from jobs.exits import RunFailed
from runtime.events import (
    ControllerRestarted,
    Recovered,
    RecoverySeconds,
    StepRecord,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
)
from runtime.run_folder import LoggedEvent
from tests.support.ray_jobs import toy_recipe, wait_until


def test_a_seed_decides_everything() -> None:
    assert schedule(3, 5, 3) == schedule(3, 5, 3)
    assert len({schedule(3, seed, 3) for seed in range(20)}) == 20


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_comes_and_the_end_is_quiet(seed: int) -> None:
    strikes = schedule(3, seed, 3)
    counts = Counter(strike.kind for strike in strikes)
    assert all(counts[kind] for kind in set(KINDS) - {"node", "join"})
    assert counts["node"] + counts["join"] >= 2 and counts["node"]
    assert [strike.at for strike in strikes] == sorted(strike.at for strike in strikes)
    assert strikes[-1].at < 3 * 60 - QUIET_END
    assert all((strike.seconds > 0) == (strike.kind in ("stop", "slow")) for strike in strikes)
    assert all(0 <= strike.pick < 1 for strike in strikes)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_the_cluster_neither_vanishes_nor_grows_without_end(seed: int, nodes: int) -> None:
    present = nodes
    for strike in schedule(30, seed, nodes):
        present += {"node": -1, "join": 1}.get(strike.kind, 0)
        assert 2 <= present <= nodes + 2


def test_too_short_for_chaos() -> None:
    with pytest.raises(ValueError, match=r"0\.3 minutes are too short for chaos: give more than 0\.38"):
        schedule(0.3, 1, 3)


def test_the_recipe_gets_room_and_keeps_its_rates() -> None:
    recipe = toy_recipe("room", 40, 3, 1)
    changed = for_chaos(recipe)
    assert changed.run.steps == WITHOUT_END and changed.decay_steps == recipe.decay_steps
    assert changed.parallel.max_workers == 5 and changed.parallel.resources == {SLOT: 1.0}
    without = toy_recipe("rates", 40, 3, 1, optimizer={"learning_rate": 1e-2})
    assert for_chaos(without).decay_steps == 40
    parallel = {**recipe.parallel.model_dump(), "gpus_per_worker": 0.5}
    with pytest.raises(ValueError, match=r"gpus_per_worker is 0\.5, but chaos makes several nodes"):
        for_chaos(toy_recipe("gpu", 40, 3, 1, parallel=parallel))


def step(number: int, committed_at: float) -> StepRecord:
    values = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "samples": 1, "tokens": 1, "seconds": 1.0}
    return StepRecord(
        step=number, workers=3, generation=1, fingerprint=0, committed_at=committed_at, **values
    )  # type: ignore[arg-type]


def lost(worker: int) -> WorkerLost:
    return WorkerLost(step=3, worker=worker, reason="silent", idle=False)


def recovered(*workers: int) -> Recovered:
    return Recovered(
        step=3,
        lost=workers,
        reason="silent",
        workers_before=3,
        workers_after=2,
        source="peers",
        from_version=2,
        moved_bytes=1,
        seconds=RecoverySeconds(detect=0.1, agree=0.1, plan=0.1, move=0.1, redo=0.1),
    )


def test_each_strike_gets_what_came_of_it() -> None:
    done = [
        Done(10.0, "worker 1 at half speed", (1,)),
        Done(20.0, "SIGKILL to worker 1", (1,)),
        Done(30.0, "SIGKILL to the controller and to worker 2", (2,), controller=True),
        Done(40.0, "worker 0 is drained", (0,)),
    ]
    events = [
        LoggedEvent(5.0, lost(2)),
        LoggedEvent(20.5, lost(1)),
        LoggedEvent(20.6, recovered(1)),
        LoggedEvent(25.0, WorkerJoined(9, 7, workers_before=2, workers_after=3, seconds=0.1)),
        LoggedEvent(32.0, ControllerRestarted(9, workers=3, seconds=2.0)),
        LoggedEvent(32.1, lost(2)),
        LoggedEvent(32.2, recovered(2)),
        LoggedEvent(
            41.0,
            WorkerLeft(9, 0, "chaos", workers_before=3, workers_after=2, seconds=0.1, notice_seconds=0.5),
        ),
    ]
    steps = [step(1, 9.0), step(2, 11.0), step(3, 19.5), step(4, 22.0), step(5, 33.0), step(6, 40.5)]
    made = account(done, events, steps)
    assert [each.made for each in made] == [
        "went on",
        "1 lost after 0.5 s (silent); recovered from peers at version 2 in 0.50 s; 7 joined",
        "2 lost after 2.1 s (silent); recovered from peers at version 2 in 0.50 s; back after 2.0 s",
        "0 left after 1.0 s",
    ]
    assert [each.standstill for each in made] == [8.5, 11.0, 11.0, 7.5]


def test_a_run_that_never_answers_is_given_up() -> None:
    with pytest.raises(RunFailed, match="it has not ended after 0 s"), _at_most(0.05):
        threading.Event().wait(30)


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_stopped_process_does_not_outlive_the_chaos() -> None:
    child = sleeper()
    try:
        with watched_processes() as processes:
            processes.note(child.pid)
            processes.signal(child.pid, signal.SIGSTOP)
            wait_until(lambda: state(child.pid) == "T", "it is stopped")
        assert child.wait(20) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()


def test_only_processes_of_the_run_get_signals() -> None:
    child = sleeper()
    try:
        processes = Processes()
        processes.signal(child.pid, signal.SIGKILL)
        assert child.poll() is None, "it was never noted"
        processes.note(child.pid)
        child.kill()
        child.wait()
        processes.signal(child.pid, signal.SIGKILL)  # gone: nothing happens
    finally:
        child.kill()
        child.wait()
