"""Two nodes of a Ray cluster are lost at once: more than any shard has copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.checkpoint import list_checkpoints
from runtime.events import (
    Recovered,
)
from runtime.run_folder import RunFolder
from runtime.sentences import sentence
from tests.support.ray_cluster import ray_cluster
from tests.support.watched import NODES, Expected, Watched, recipe_of, start

pytestmark = pytest.mark.ray


def test_two_at_once_cost_the_steps_since_the_newest_checkpoint(tmp_path: Path) -> None:
    """Nothing is complete any more, so it goes on from what is on disk, and the log says so."""
    # the owner and the backup of a shard are read from the plan, which must not change before they are lost
    recipe = recipe_of("nodes", checkpoint={"every": 10, "keep": 2})
    with ray_cluster(NODES, 1) as cluster, start(tmp_path, recipe) as run:
        watched = Watched(run, RunFolder(tmp_path), Expected(recipe))
        members = watched.full()
        placed = run.domains()
        assert len({placed[worker] for worker in members}) == NODES, "there is room for one on each node"
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
