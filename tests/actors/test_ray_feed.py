"""Feed workers on real Ray: a training worker is killed, a node is left, a feed worker is killed; bits and
ledger stay as they are.

One run goes through all of it, one after the other.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private.state import available_resources_per_node
from rich.console import Console

from actors import feed
from actors.cluster import RayRun
from actors.feed import FeedCrew
from actors.local_cluster import SLOT, LocalCluster
from actors.names import LEFT_NODE
from jobs.assembly import assemble, run_settings
from jobs.data.curated import open_set
from jobs.data.multimodal import MultimodalData
from jobs.recipe.recipe import Recipe
from jobs.verify import verify
from runtime.events import FeedWorkerLost, FeedWorkerReplaced, Recovered
from runtime.run_folder import RunFolder
from tests.support.captions import SIZE, write_set
from tests.support.paced_captions import PacedCaptions
from tests.support.ray_cluster import ray_cluster
from tests.support.ray_jobs import began_at, toy_recipe, wait_until

pytestmark = pytest.mark.ray

FEED_WORKERS = 3
"""One for each node, the head among them, as a rule: Ray may know too late of what it has placed already."""

MANY = 100_000
"""Steps of a run that is stopped when the test has seen enough."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with ray_cluster(nodes=2, slots=2) as cluster:
        yield cluster


def captions_recipe(source: Path) -> Recipe:
    return toy_recipe(
        "feed",
        MANY,
        3,
        2,
        model={
            "build": "jobs.models.captioner:build",
            "arguments": {
                "image_size": SIZE,
                "patch": 8,
                "width": 8,
                "depth_image": 1,
                "depth_text": 1,
                "heads": 2,
                "vocabulary": open_set(source).tokenizer.vocabulary,
                "context": 20,
            },
        },
        data={
            "build": "tests.support.paced_captions:build_paced_captions",
            "arguments": {"source": str(source), "context": 20, "slots": 3, "crop": 0.2, "seconds": 0.1},
            "feed_workers": FEED_WORKERS,
            "feed_cpus": 0.1,
        },
        parallel={
            "workers": 3,
            "stages": 2,
            "micro_batches": 5,
            "micro_batch_size": 1,
            "cpus_per_worker": 0.1,
            "resources": {SLOT: 1.0},
        },
    )


@dataclass
class Fed:
    run: RayRun
    folder: RunFolder
    cluster: LocalCluster

    def events(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.run.progress(MANY, 0).events if isinstance(event, kind)]

    def at_work(self) -> tuple[int, ...]:
        plan = self.run.plan()
        return plan.workers if plan is not None else ()

    def goes_on(self, what: str) -> None:
        reached = self.run.progress(MANY, MANY).steps_total + 3
        wait_until(lambda: self.run.progress(MANY, MANY).steps_total >= reached, what)


@pytest.fixture(scope="module")
def fed(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fed]:
    base = tmp_path_factory.mktemp("fed")
    recipe = captions_recipe(write_set(base / "set"))
    folder = RunFolder.create(base / "run", recipe.to_toml(), {"device": "cpu"})
    settings = replace(run_settings(recipe, folder.path), feed_empty_seconds=2.0)
    with RayRun(assemble(recipe, str(folder.checkpoints)), settings) as run:
        fed = Fed(run, folder, cluster)
        wait_until(lambda: len(run.feed_processes()) == FEED_WORKERS, "feed workers")
        fed.goes_on("steps")
        yield fed


def test_one_whose_data_could_not_be_opened_is_asked_for_again(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray starts none again whose constructor raised."""
    monkeypatch.setattr(feed, "FIRST_PAUSE", 0.1)
    tried = tmp_path / "tried"

    def build() -> object:
        if not tried.exists():
            tried.touch()
            raise OSError("the share is not mounted yet")
        return object()

    noted: list[Any] = []
    job: Any = SimpleNamespace(feed_workers=1, build_data=build)
    crew = FeedCrew("late", job, 0.1, noted.append, step=lambda: 4, emptied=frozenset)
    crew.start()
    try:
        wait_until(lambda: crew.processes, "it is there")
    finally:
        crew.end()
    lost, replaced = noted
    assert isinstance(lost, FeedWorkerLost) and isinstance(replaced, FeedWorkerReplaced)
    assert lost.reason == "process died" and replaced.seconds > 0.1


def test_a_training_worker_is_killed(fed: Fed) -> None:
    """One of the two that share a node: the run goes on without it, with a worker on each node."""
    placed = fed.run.domains()
    nodes = list(placed.values())
    victim = next(worker for worker, node in placed.items() if nodes.count(node) == 2)
    os.kill(fed.run.processes()[victim], signal.SIGKILL)
    (recovered,) = wait_until(lambda: fed.events(Recovered), "the recovery")
    assert recovered.lost == (victim,)
    fed.goes_on("the run goes on without it")
    assert len(fed.run.feed_processes()) == FEED_WORKERS and not fed.events(FeedWorkerLost)


def test_a_node_that_the_workers_have_left_is_left_by_feed_workers_too(fed: Fed) -> None:
    """Or no autoscaler could take it back."""

    def idle(node: str) -> bool:
        there = available_resources_per_node()[node]
        return all(there.get(name) == total for name, total in {"CPU": 1.0, SLOT: 2.0}.items())

    before, members, placed = fed.run.feed_processes(), fed.at_work(), fed.run.domains()
    assert {placed[worker] for worker in members} == set(fed.cluster.nodes())
    fed.run.resize(1)
    (staying,) = wait_until(lambda: len(fed.at_work()) == 1 and fed.at_work(), "one at work")
    (left,) = {placed[worker] for worker in members if worker != staying}
    wait_until(lambda: idle(left), "nothing of the run is on the node that was left")
    lost = fed.events(FeedWorkerLost)  # of all that were there: they are told of before they leave
    wait_until(lambda: len(fed.events(FeedWorkerReplaced)) == len(lost), "as many have come")
    replaced = fed.events(FeedWorkerReplaced)
    moved = {event.feed_worker for event in lost}
    assert len(moved) == len(lost), "none moves twice"
    assert moved == {event.feed_worker for event in replaced}
    assert fed.events(FeedWorkerLost) == lost and {event.reason for event in lost} <= {LEFT_NODE}
    now = fed.run.feed_processes()
    assert {worker for worker in before if now[worker] != before[worker]} == moved
    assert not idle(placed[staying])


def test_a_feed_worker_is_killed(fed: Fed) -> None:
    feeders, before = fed.run.feed_processes(), len(fed.events(FeedWorkerLost))
    os.kill(feeders[0], signal.SIGKILL)
    (lost,) = wait_until(lambda: fed.events(FeedWorkerLost)[before:], "the loss is noticed")
    assert lost.feed_worker == 0 and "died" in lost.reason
    (replaced,) = wait_until(lambda: fed.events(FeedWorkerReplaced)[before:], "another one is there")
    assert replaced.feed_worker == 0 and fed.run.feed_processes()[0] != feeders[0]
    fed.goes_on("the run goes on with it")


def test_the_end_is_no_loss_and_every_sample_was_read_once(fed: Fed, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [*fed.run.feed_processes().values(), *fed.run.processes().values()]
    lost = fed.events(FeedWorkerLost)
    fed.run.stop()
    wait_until(lambda: fed.run.wait(1.0), "the end")
    assert fed.run.progress(0, 0).outcome == "interrupted"
    assert fed.events(FeedWorkerLost) == lost, "the end of the run is no loss"
    wait_until(lambda: not any(map(began_at, ours)), "all processes of the run have ended")
    monkeypatch.setattr(PacedCaptions, "inputs", MultimodalData.inputs)  # nobody has to be left time here
    output = io.StringIO()
    assert verify(fed.folder.path, Console(file=output, width=200)), output.getvalue()
    assert "no sample lost or repeated" in output.getvalue()
    assert f"{1 + len(lost)} losses" in output.getvalue()
