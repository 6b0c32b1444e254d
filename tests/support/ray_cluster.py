"""A Ray cluster of several nodes on this machine, of which nothing is left afterwards."""

from __future__ import annotations

import os
import secrets
import signal
from contextlib import suppress
from types import TracebackType
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.support.ray_jobs import TOKEN, descendants

SLOT = "slot"
"""The resource that a worker takes up, so that none is placed on the head."""


class RayCluster:
    """A head for driver and controller, and ``nodes`` with room for ``slots`` workers each."""

    def __init__(self, nodes: int, slots: int) -> None:
        self._slots = slots
        self._count = nodes
        self._token = secrets.token_hex(8)
        self._cluster: Any = None

    def __enter__(self) -> RayCluster:
        os.environ[TOKEN] = self._token  # of every process that is started from here on
        try:
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 1,
                    "include_dashboard": False,
                    "_system_config": {"worker_niceness": 0},
                },
            )
            ray.init(address=self.address, logging_level="ERROR", log_to_driver=False)
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
        del os.environ[TOKEN]
        for process in descendants(self._token):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    @property
    def address(self) -> str:
        address: str = self._cluster.address
        return address

    def nodes(self) -> list[str]:
        """The ids of the nodes that workers are placed on."""
        return sorted(node.node_id for node in self._cluster.worker_nodes)

    def add(self, count: int = 1) -> None:
        """Adds nodes; returns when Ray knows them."""
        for _ in range(count):
            self._cluster.add_node(num_cpus=1, resources={SLOT: self._slots})

    def lose(self, *nodes: str) -> None:
        """SIGKILL to the raylets of these nodes and to whatever they started beside workers, which end
        with their raylet."""
        for node in [node for node in self._cluster.worker_nodes if node.node_id in nodes]:
            self._cluster.remove_node(node, allow_graceful=False)
