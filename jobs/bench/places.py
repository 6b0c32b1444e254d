"""A Ray cluster of one node per place, whose nodes are taken away as a cloud takes them: all at once.

Each place is a Ray node of its own (a raylet with its agents and one CPU) on this machine. Taking a place
away sends SIGKILL to everything on it at once, raylet and workers, so that nothing is left to tell of it.
The head has no CPU: controllers and drivers live there, workers do not.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.cluster_utils import Cluster

from actors.local_cluster import descendants

HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""Ray finds a lost node in seconds, not in the half minute of its defaults: whoever waits for Ray gains."""

NODE_BOOT_SECONDS = 2.5
"""About how long a node takes from its start until it is part of the cluster."""

_OBJECT_STORE_BYTES = 80 * 2**20


class Places:
    """``count`` places, numbered from 0. A context manager: at its end no process of the cluster is left.

    Drivers ``connect``, or join by ``address``.
    """

    def __init__(self, count: int) -> None:
        config = {"worker_niceness": 0, **HEALTH_CHECKS}  # nobody else lives on a cluster of our own
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "include_dashboard": False,
                "_system_config": config,
            },
        )
        self._nodes: dict[int, Any] = {}
        try:
            for place in range(count):
                self.give_back(place)
        except BaseException:
            self._cluster.shutdown()  # type: ignore[no-untyped-call]
            raise

    def __enter__(self) -> Places:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.shutdown()
        self._cluster.shutdown()  # type: ignore[no-untyped-call]

    @property
    def address(self) -> str:
        address: str = self._cluster.address
        return address

    def connect(self) -> None:
        """Makes this process a driver of the cluster, on its head."""
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        ray.init(address=self.address, **quiet)
        head: Any = self._cluster.head_node
        assert ray.get_runtime_context().get_node_id() == head.node_id

    def give_back(self, place: int) -> None:
        """Starts the node of ``place``; returns when it is part of the cluster, after some
        ``NODE_BOOT_SECONDS``. Raises RuntimeError if it does not come up."""
        assert place not in self._nodes, "the place is taken"
        try:
            self._nodes[place] = self._cluster.add_node(
                wait=True, num_cpus=1, object_store_memory=_OBJECT_STORE_BYTES
            )
        except Exception as error:  # Ray raises no narrower one
            raise RuntimeError(f"Ray could not start the node of place {place}: {error}") from error

    def processes(self, place: int) -> list[int]:
        """The raylet's process id, then those of all its descendants: agents and Ray workers."""
        raylet = self._raylet(place)
        return [raylet, *descendants(raylet)]

    def take_away(self, place: int) -> float:
        """Kills the node of ``place`` with everything on it; returns when, in seconds since 1970."""
        processes = self.processes(place)
        at = time.time()
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._cluster.remove_node(self._nodes.pop(place), allow_graceful=False)
        return at

    def head_processes(self) -> list[int]:
        """As ``processes``, of the head."""
        head: Any = self._cluster.head_node
        (info,) = head.all_processes["raylet"]
        return [info.process.pid, *descendants(info.process.pid)]

    def actor_on_head(self, name: str) -> int | None:
        """The process id of an actor on the head, by its class's name; None if there is none."""
        for process in self.head_processes():
            with suppress(OSError):  # it ended meanwhile
                title = Path(f"/proc/{process}/cmdline").read_bytes()
                if title.startswith(f"ray::{name}".encode()):
                    return process
        return None

    def _raylet(self, place: int) -> int:
        (info,) = self._nodes[place].all_processes["raylet"]
        process: int = info.process.pid
        return process
