"""Members of a run on real Ray come and go, by real signals: the bits of one plain process all the same.

One run goes through most events, one after the other; every test compares all steps up to then.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import ray

from actors.crew import worker_names
from actors.local_cluster import LocalCluster
from actors.names import NAMESPACE
from actors.reassurance import Reassurance
from jobs.control import drain
from jobs.recipe.recipe import Recipe
from jobs.train import attach
from runtime.checkpoint import list_checkpoints
from runtime.events import (
    ControllerRestarted,
    Recovered,
    WorkerLeft,
    WorkerLost,
)
from runtime.run_folder import RunFolder
from runtime.sentences import sentence
from tests.support.ray_cluster import ray_cluster
from tests.support.ray_jobs import began_at, wait_until
from tests.support.watched import NODES, Expected, Watched, recipe_of, start

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "jobs.cli"]
SLOTS = 1
"""Of each node: one of them stands by."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with ray_cluster(NODES, SLOTS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def watched(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("events")
    metrics = {"port": 0, "targets": str(tmp_path_factory.mktemp("targets"))}
    recipe = recipe_of("events", checkpoint={"every": 10, "keep": 2}, metrics=metrics)
    with start(folder, recipe) as run:
        watched = Watched(run, RunFolder(folder), Expected(recipe))
        watched.until(lambda: watched.steps() >= 3, "the first steps")
        yield watched


def test_who_takes_over_reassures_until_it_is_there(cluster: LocalCluster) -> None:
    @ray.remote(num_cpus=0)
    class Orphan:
        asked = 0

        def wait_on(self) -> None:
            self.asked += 1

        def has_been_asked(self) -> int:
            return self.asked

    orphan: Any = Orphan.options(name="an orphan", namespace=NAMESPACE).remote()
    reassurance = Reassurance({0: "an orphan", 1: "one that is dead"}, 0.4)
    wait_until(lambda: ray.get(orphan.has_been_asked.remote()) > 3, "it is asked again and again")
    reassurance.end()
    asked = ray.get(orphan.has_been_asked.remote())
    time.sleep(0.4)
    assert ray.get(orphan.has_been_asked.remote()) <= asked + 1
    ray.kill(orphan)


def test_only_workers_have_loaded_pytorch(watched: Watched) -> None:
    def has(process: int) -> bool:
        return "libtorch" in Path(f"/proc/{process}/maps").read_text()

    assert all(map(has, watched.run.processes().values()))
    assert not has(watched.run.controller_process())


def test_a_killed_worker_is_replaced(watched: Watched) -> None:
    victim = watched.full()[0]
    watched.kill(victim)
    watched.replaced(victim)
    recovered = [event for event in watched.events(Recovered) if victim in event.lost]
    assert [event.source for event in recovered] == ["peers"]
    watched.assert_same_bits()


def test_a_worker_drained_by_hand_leaves_and_is_replaced(watched: Watched) -> None:
    victim = watched.full()[1]
    process = watched.run.processes()[victim]
    with pytest.raises(ValueError, match="worker 999 has no work"):
        drain(watched.folder.path, 999)
    drain(watched.folder.path, victim, 60.0)
    watched.replaced(victim)
    left = watched.heard(WorkerLeft, victim)
    assert left.reason == "drained by hand"
    wait_until(lambda: began_at(process) is None, "its process has ended")
    assert victim not in {event.worker for event in watched.events(WorkerLost)}, "no work was lost"
    watched.assert_same_bits()


def test_a_node_that_ray_drains_is_left_in_time(cluster: LocalCluster, watched: Watched) -> None:
    """As a spot machine's notice comes: Ray takes the node away when the deadline has passed."""
    members = watched.full()
    placed = watched.run.domains()
    node = placed[members[0]]
    going = [worker for worker in members if placed[worker] == node]
    cluster.drain(node, 30.0)
    watched.replaced(*going)
    for worker in going:
        assert watched.heard(WorkerLeft, worker).reason == "its node is being drained"
    assert not set(going) & {event.worker for event in watched.events(WorkerLost)}, "no work was lost"
    cluster.lose(node)
    cluster.add()
    watched.assert_same_bits()


def test_sigterm_is_a_notice(watched: Watched) -> None:
    victim = watched.full()[2]
    process = watched.kill(victim, signal.SIGTERM)
    watched.replaced(victim)
    assert watched.heard(WorkerLeft, victim).reason == "SIGTERM"
    wait_until(lambda: began_at(process) is None, "its process has ended")
    assert victim not in {event.worker for event in watched.events(WorkerLost)}, "no work was lost"
    watched.assert_same_bits()


def test_a_stopped_worker_is_fenced_and_leaves_when_it_wakes_up(watched: Watched) -> None:
    victim = watched.full()[0]
    process = watched.kill(victim, signal.SIGSTOP)
    lost = watched.heard(WorkerLost, victim)
    assert lost.reason.startswith("no sign of life for"), lost
    os.kill(process, signal.SIGCONT)
    wait_until(lambda: began_at(process) is None, "it has left")
    watched.replaced(victim)
    watched.assert_same_bits()


def test_a_stopped_worker_that_never_wakes_up_is_ended(watched: Watched) -> None:
    victim = watched.full()[1]
    process = watched.kill(victim, signal.SIGSTOP)
    watched.replaced(victim)
    wait_until(lambda: began_at(process) is None, "it was ended")
    watched.assert_same_bits()


def test_training_goes_on_while_the_controller_is_started_anew(watched: Watched) -> None:
    before = watched.full()
    generation, step = watched.plan().generation, watched.steps()
    restarts = len(watched.events(ControllerRestarted))
    old = watched.run.controller_process()
    os.kill(old, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"worker 999 has no work in .*: its workers are \d"):
        drain(watched.folder.path, 999)
    watched.until(lambda: len(watched.events(ControllerRestarted)) > restarts, "another controller")
    assert watched.run.controller_process() != old
    watched.goes_on()
    assert watched.plan().workers == before and watched.plan().generation == generation
    assert watched.events(ControllerRestarted)[-1].step > step + 1, "steps were made meanwhile"
    watched.assert_same_bits()


def test_a_port_that_somebody_took_meanwhile_costs_no_run(watched: Watched) -> None:
    restarts = len(watched.events(ControllerRestarted))
    port = watched.folder.controller_facts()["metrics_port"]
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        os.kill(watched.run.controller_process(), signal.SIGKILL)
        wait_until(lambda: is_bound(other, port), "the port is free", interval=0.01)
        watched.until(lambda: len(watched.events(ControllerRestarted)) > restarts, "another controller")
        now = watched.folder.controller_facts()["metrics_port"]
        assert now != port
        assert b"reknit_step" in urlopen(f"http://127.0.0.1:{now}/metrics", timeout=30).read()
    watched.goes_on()
    watched.assert_same_bits()


def is_bound(listener: socket.socket, port: int) -> bool:
    """Whether it now listens there; not as long as somebody else does."""
    with suppress(OSError):
        listener.bind(("127.0.0.1", port))
        listener.listen()
        return True
    return False


def test_no_number_of_lost_controllers_costs_a_worker(watched: Watched) -> None:
    """More than a worker's actor has threads: none of them may be left with a caller that is gone."""
    before = watched.full()
    processes = {worker: watched.run.processes()[worker] for worker in before}
    for _ in range(5):
        restarts = len(watched.events(ControllerRestarted))
        os.kill(watched.run.controller_process(), signal.SIGKILL)
        watched.until(lambda known=restarts: len(watched.events(ControllerRestarted)) > known, "another one")
        watched.goes_on(1)
    assert watched.plan().workers == before
    assert {worker: watched.run.processes()[worker] for worker in before} == processes
    watched.assert_same_bits()


def test_a_worker_lost_without_a_controller_is_replaced_by_the_next_one(watched: Watched) -> None:
    victim = watched.full()[1]
    process = watched.run.processes()[victim]
    os.kill(watched.run.controller_process(), signal.SIGKILL)
    os.kill(process, signal.SIGKILL)
    watched.replaced(victim)
    (recovered,) = [event for event in watched.events(Recovered) if victim in event.lost]
    assert recovered.source == "peers"
    watched.assert_same_bits()


def test_a_lost_node_takes_nothing_with_it(cluster: LocalCluster, watched: Watched) -> None:
    members = watched.full()
    placed = watched.run.domains()
    node = placed[members[0]]
    gone = [worker for worker in members if placed[worker] == node]
    cluster.lose(node)
    cluster.add()
    watched.replaced(*gone)
    recovered = [event for event in watched.events(Recovered) if set(gone) & set(event.lost)]
    assert {event.source for event in recovered} == {"peers"}
    watched.assert_same_bits()


def test_two_nodes_at_once_cost_the_steps_since_the_newest_checkpoint(
    cluster: LocalCluster, watched: Watched
) -> None:
    """More than any shard has copies: it goes on from what is on disk, and the log says so."""
    members = watched.full()
    placed = watched.run.domains()
    assert len({placed[worker] for worker in members}) == len(members), "there is room for one on each node"
    watched.until(lambda: list_checkpoints(watched.folder.checkpoints), "a checkpoint")
    watched.goes_on()
    shard = next(shard for shard in watched.plan().shards if shard.backup is not None)
    assert shard.backup is not None
    gone = (shard.owner, shard.backup)
    cluster.lose(*(placed[worker] for worker in gone))
    recovered = watched.until(
        lambda: [event for event in watched.events(Recovered) if set(gone) & set(event.lost)], "recovery"
    )
    watched.goes_on()
    assert recovered[-1].source == "checkpoint" and recovered[-1].from_version >= 10
    assert "from the checkpoint" in sentence(recovered[-1])
    watched.assert_same_bits()


def test_a_stop_ends_the_run_with_a_checkpoint(watched: Watched) -> None:
    """Asked for while there is no controller: the next one sees to it. Whether or not workers are on their
    way."""
    processes = watched.run.processes()
    os.kill(watched.run.controller_process(), signal.SIGKILL)
    watched.run.stop()
    wait_until(lambda: watched.run.wait(1.0), "the end")
    watched.run.finish()
    progress = watched.run.progress(0, 0)
    assert progress.outcome == "interrupted", progress.message
    assert list_checkpoints(watched.folder.checkpoints)[-1] == len(progress.steps)
    watched.assert_same_bits()
    wait_until(lambda: not any(map(began_at, processes.values())), "the workers' processes have ended")
    watched.run.end()
    with pytest.raises(
        ConnectionError, match=r"controller is gone and Ray starts no other \(.+\): if the run had"
    ):
        watched.run.plan()


@contextmanager
def driven(cluster: LocalCluster, folder: Path, recipe: Recipe, *options: str) -> Iterator[RunFolder]:
    """A run that another process drives, which gets SIGKILL after three steps."""
    file = folder.with_suffix(".toml")
    file.write_text(recipe.to_toml())
    train = [
        *COMMAND,
        "train",
        str(file),
        "--run-folder",
        str(folder),
        "--address",
        cluster.address,
        *options,
    ]
    driver = subprocess.Popen(train, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:

        def has_three_steps() -> bool:
            assert driver.poll() is None, "it ended before"
            return len(RunFolder(folder).read_steps().steps) >= 3

        wait_until(has_three_steps, "three steps")
    finally:
        driver.kill()
        driver.wait()
    yield RunFolder(folder)


def test_a_detached_run_outlives_its_driver(cluster: LocalCluster, tmp_path: Path) -> None:
    recipe = recipe_of("detached", 20, workers=1)
    with driven(cluster, tmp_path / "run", recipe, "--detach") as folder:
        shown = subprocess.run(
            [*COMMAND, "attach", str(folder.path)], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "started from the initial state" in shown.stdout and "completed with 1 worker" in shown.stdout
    steps = folder.read_steps().steps
    assert [(s.loss, s.grad_norm, s.fingerprint) for s in steps] == Expected(recipe).first(20)
    with pytest.raises(ValueError, match="it has ended"):
        attach(folder.path)


def test_a_run_that_is_not_detached_ends_with_its_driver(cluster: LocalCluster, tmp_path: Path) -> None:
    """The controller ends with its driver's job, and the workers when none has come back for long enough."""
    detection = {"silence_seconds": 2.0, "orphan_seconds": 2.0}
    with driven(cluster, tmp_path / "run", recipe_of("orphan", workers=1, detection=detection)) as folder:
        name = folder.controller_facts()["name"]
        wait_until(lambda: not worker_names(name), "the workers have ended")
        with pytest.raises(ValueError, match="it has ended"):
            attach(folder.path)
