"""A Ray cluster of several nodes, of which no process is left after a test, whatever happened."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
