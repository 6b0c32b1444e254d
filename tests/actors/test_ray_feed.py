"""Feed workers on real Ray: one is killed, then a training worker; bits and ledger stay as they are."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray._private.state import available_resources_per_node
from rich.console import Console

from actors.cluster import RayRun
from actors.local_cluster import SLOT, LocalCluster
from jobs.assembly import assemble, run_settings
from jobs.data.curated import open_set
from jobs.recipe import Recipe
from jobs.verify import verify
from runtime.events import FeedWorkerLost, FeedWorkerReplaced, Recovered
from runtime.run_folder import RunFolder
from tests.support.captions import SIZE, write_set
from tests.support.ray_cluster import ray_cluster
from tests.support.ray_jobs import began_at, toy_recipe, wait_until

pytestmark = pytest.mark.ray

MANY = 100_000
"""Steps of a run that is stopped when the test has seen enough."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with ray_cluster(nodes=2, slots=1) as cluster:
        yield cluster


def captions_recipe(source: Path, **parallel: Any) -> Recipe:
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
            "build": "tests.support.ray_jobs:build_paced_captions",
            "arguments": {"source": str(source), "context": 20, "slots": 3, "crop": 0.2, "seconds": 0.01},
            "feed_workers": 2,
            "feed_cpus": 0.1,
        },
        parallel={
            "workers": 3,
            "stages": 2,
            "micro_batches": 5,
            "micro_batch_size": 1,
            "cpus_per_worker": 0.1,
            **parallel,
        },
    )


def test_a_feed_worker_and_a_training_worker_are_killed(tmp_path: Path, cluster: LocalCluster) -> None:
    recipe = captions_recipe(write_set(tmp_path / "set"))
    folder = RunFolder.create(tmp_path / "run", recipe.to_toml(), {"device": "cpu"})
    job = assemble(recipe, str(folder.checkpoints))
    with RayRun(job, run_settings(recipe, folder.path)) as run:

        def events(kind: type[Any]) -> list[Any]:
            return [event for event in run.progress(MANY, 0).events if isinstance(event, kind)]

        def steps() -> int:
            return run.progress(MANY, MANY).steps_total

        feeders = wait_until(lambda: len(run.feed_processes()) == 2 and run.feed_processes(), "feed workers")
        wait_until(lambda: steps() >= 3, "steps")
        os.kill(feeders[0], signal.SIGKILL)
        (lost,) = wait_until(lambda: events(FeedWorkerLost), "the loss is noticed")
        assert lost.feed_worker == 0 and "died" in lost.reason
        (replaced,) = wait_until(lambda: events(FeedWorkerReplaced), "another one is there")
        assert replaced.feed_worker == 0 and run.feed_processes()[0] != feeders[0]
        seen = steps()
        wait_until(lambda: steps() >= seen + 3, "the run goes on with it")

        os.kill(run.processes()[1], signal.SIGKILL)
        (recovered,) = wait_until(lambda: events(Recovered), "the recovery")
        assert recovered.lost == (1,)
        seen = steps()
        wait_until(lambda: steps() >= seen + 3, "the run goes on without it")
        ours = [*run.feed_processes().values(), *run.processes().values()]
        run.stop()
        wait_until(lambda: run.wait(0.1), "the end")
        assert run.progress(0, 0).outcome == "interrupted"
        assert len(events(FeedWorkerLost)) == 1, "the end of the run is no loss"
        wait_until(lambda: not any(map(began_at, ours)), "all processes of the run have ended")
    output = io.StringIO()
    assert verify(folder.path, Console(file=output, width=200)), output.getvalue()
    assert "no sample lost or repeated" in output.getvalue() and "2 losses" in output.getvalue()


def test_a_node_that_the_workers_have_left_is_left_by_feed_workers_too(
    tmp_path: Path, cluster: LocalCluster
) -> None:
    """Or no autoscaler could take it back."""
    recipe = captions_recipe(write_set(tmp_path / "set"), workers=2, stages=1, resources={SLOT: 1.0})
    folder = RunFolder.create(tmp_path / "run", recipe.to_toml(), {"device": "cpu"})
    job = replace(assemble(recipe, str(folder.checkpoints)), feed_workers=3)
    with RayRun(job, run_settings(recipe, folder.path)) as run:

        def idle(node: str) -> bool:
            there = available_resources_per_node()[node]
            return all(there.get(name) == total for name, total in {"CPU": 1.0, SLOT: 1.0}.items())

        wait_until(lambda: len(run.feed_processes()) == 3, "feed workers")
        plan = wait_until(lambda: (p := run.plan()) and len(p.workers) == 2 and p, "both at work")
        placed = run.domains()
        assert set(placed.values()) == set(cluster.nodes())
        before = dict(run.feed_processes())
        run.resize(1)
        (staying,) = wait_until(lambda: len(run.plan().workers) == 1 and run.plan().workers, "one at work")
        (left,) = {placed[worker] for worker in plan.workers if worker != staying}
        wait_until(lambda: idle(left), "nothing of the run is on the node that was left")
        wait_until(lambda: len(set(run.feed_processes().items()) - set(before.items())) == 1, "one moved")
        assert not idle(placed[staying])
