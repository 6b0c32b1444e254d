"""A Ray cluster of several nodes on this one machine, whose nodes can be lost for real."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.cluster_utils import Cluster

SLOT = "slot"
"""The custom resource that a worker has to take up, so that none is placed on the head."""


class LocalCluster:
    """A head for driver and controller, and ``nodes`` with room for ``slots`` workers of ``cpus`` each.

    A context manager, to be entered in the main thread; this process is connected meanwhile, and at its end
    the cluster is gone. Workers end when their node's raylet does, unless they are stopped (SIGSTOP).
    """

    def __init__(self, nodes: int, slots: int, cpus: float = 0.0) -> None:
        self._count, self._slots, self._cpus = nodes, slots, cpus
        self._cluster: Any = None

    def __enter__(self) -> LocalCluster:
        try:
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 1,
                    "include_dashboard": False,
                    "include_log_monitor": False,  # it passes on what workers print, which nobody asks for
                    "no_monitor": True,  # the autoscaler's, which has no nodes to bring here
                    "_system_config": {"worker_niceness": 0},  # nobody else lives on a cluster of our own
                },
            )
            ray.init(address=self.address, logging_level=logging.ERROR, log_to_driver=False)
            self.add(self._count)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.shutdown()
        if self._cluster is not None:
            self._cluster.shutdown()

    @property
    def address(self) -> str:
        """Where others reach the cluster."""
        address: str = self._cluster.address
        return address

    def nodes(self) -> list[str]:
        """The ids of the nodes that workers are placed on, ascending."""
        return sorted(node.node_id for node in self._cluster.worker_nodes)

    def add(self, count: int = 1) -> None:
        """Adds nodes, one after the other; returns when Ray knows them."""
        for _ in range(count):
            cpus = max(1, math.ceil(self._slots * self._cpus))
            self._cluster.add_node(num_cpus=cpus, resources={SLOT: self._slots})

    def lose(self, *nodes: str) -> None:
        """SIGKILL to everything on these nodes, raylets and workers, all at once: a recovery takes
        milliseconds, and must not find time to happen in between."""
        lost = [node for node in self._cluster.worker_nodes if node.node_id in nodes]
        raylets = [node.all_processes["raylet"][0].process.pid for node in lost]
        for process in [process for raylet in raylets for process in (*descendants(raylet), raylet)]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for node in lost:
            self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: str, seconds: float) -> None:
        """Has Ray say that ``node`` is to be preempted in ``seconds``, and place nothing there any more."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # the autoscalers use it
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = round((time.time() + seconds) * 1e3)
        accepted, why = GcsClient(address=self.address).drain_node(node, reason, "preempted", deadline_ms)
        assert accepted, why


def descendants(process: int) -> list[int]:
    """Process ids of all children of ``process``, their children and so on (Linux)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found: list[int] = []
    frontier = [process]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, ())]
        found += frontier
    return found
