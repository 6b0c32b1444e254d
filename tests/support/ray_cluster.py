"""Ray clusters on this machine, of which no process is left after a test, whatever happened."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray
from ray.cluster_utils import Cluster

from actors.local_cluster import LocalCluster
from tests.support.ray_jobs import TOKEN, descendants


@contextmanager
def ray_cluster(nodes: int, slots: int) -> Iterator[LocalCluster]:
    token = secrets.token_hex(8)
    os.environ[TOKEN] = token  # of every process that is started from here on
    try:
        with LocalCluster(nodes, slots) as cluster:
            yield cluster
    finally:
        del os.environ[TOKEN]
        for process in descendants(token):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@contextmanager
def local_ray(cpus: int) -> Iterator[Cluster]:
    """A Ray of one node, to which more can be added; this process is connected to it. As
    ``actors.cluster.connect`` starts one, but without the processes that nothing here asks for (Ray's log
    monitor, the autoscaler's monitor)."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": cpus,
            "num_gpus": 0,
            "include_dashboard": False,
            "include_log_monitor": False,
            "no_monitor": True,
            "_system_config": {"worker_niceness": 0},
        },
    )
    try:
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
