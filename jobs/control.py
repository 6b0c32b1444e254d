"""What can be asked of a run that is under way on the cluster that this machine is part of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.cluster import RayRun, connect, run_called
from runtime.run_folder import RunFolder
from runtime.settings import ray_address

SHORTEST_NODE = 8
"""The fewest digits of a node's id that are taken for one; a shorter number is a worker's."""


def drain(run: str | Path, target: str | int, deadline: float | None = None) -> tuple[int, ...]:
    """Has a worker, or all workers of a node, leave at the next step boundary, with no work lost.

    ``run`` is a run's folder, or its name on the cluster that this process was started for. ``target`` is a
    worker's number, or a Ray node's id or at least its first eight digits; no further worker of the run is
    placed on such a node. ``deadline``: seconds until it is taken away. Returns the workers that were told.
    Raises ValueError if the run is not under way or has no such worker at work.
    """
    target = str(target)
    with found(run) as way:
        if not target.isdigit() or len(target) >= SHORTEST_NODE:
            if len(target) < SHORTEST_NODE or set(target) - set("0123456789abcdef"):
                raise ValueError(
                    f"{target!r} is neither a worker's number nor a Ray node's id (at least its first eight "
                    "hexadecimal digits, as `ray list nodes` shows them)"
                )
            return way.drain_node(target, deadline)
        if not way.drain(int(target), "drained by hand", deadline):
            plan = way.plan()
            members = ", ".join(map(str, plan.workers)) if plan else "none yet"
            raise ValueError(f"worker {target} has no work in {run}: its workers are {members}")
        return (int(target),)


def resize(run: str | Path, workers: int) -> None:
    """Aims for so many workers from now on: more are asked for, surplus ones leave at a step boundary.

    Raises ValueError if the run is not under way or its recipe does not allow that.
    """
    with found(run) as way:
        way.resize(workers)


@contextmanager
def found(run: str | Path | RunFolder) -> Iterator[RayRun]:
    """The run that is recorded in a folder, or called so, and under way on its cluster. Raises ValueError if
    it is not."""
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    facts = folder.controller_facts()
    if folder.exists() and "name" in facts:
        with connect(facts["address"], 1, 0.0, 0.0), RayRun.find(facts["name"]) as way:
            yield way
        return
    if isinstance(run, RunFolder) or ray_address() is None:
        raise ValueError(f"{folder.path} holds no run that was started on a Ray cluster: name a run's folder")
    with connect(None, 1, 0.0, 0.0), RayRun.find(run_called(str(run))) as way:
        yield way
