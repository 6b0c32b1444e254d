"""A Ray cluster whose head has a dashboard, and a way to it that can be cut."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import ray
from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster

from tests.support.ray_jobs import TOKEN, descendants

_PORTS = range(20_000, 32_768)
"""Above those that Ray's workers listen at, below those that the kernel gives to whoever connects: a port
that is to be bound later is not taken by somebody else meanwhile."""


def free_port() -> int:
    while True:
        port = secrets.choice(_PORTS)
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.bind(("", port))
            return port


@dataclass(frozen=True)
class Head:
    """``url`` is the dashboard's; this process is connected to the cluster."""

    url: str
    cluster: Any


@contextmanager
def dashboard_cluster(nodes: int, cpus: int) -> Iterator[Head]:
    """A head without room for workers and ``nodes`` with ``cpus`` each, of which nothing is left
    afterwards. What Ray asks of its clients is this process's mode."""
    token = secrets.token_hex(8)
    cluster: Any = None
    # short, for sockets; a folder of its own, since a job asks the file there which cluster it belongs to
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN, token)  # of every process that is started from here on
        # `python` in an entry point is the one that runs the tests
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.delenv("RAY_ADDRESS", raising=False)
        try:
            port = free_port()
            cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 0,
                    "include_dashboard": True,
                    "dashboard_port": port,
                    "dashboard_agent_listen_port": free_port(),
                    "include_log_monitor": False,
                    "no_monitor": True,
                    "temp_dir": folder,
                    "_system_config": {"worker_niceness": 0},
                },
            )
            write_ray_address(cluster.gcs_address, folder)
            for _ in range(nodes):
                cluster.add_node(num_cpus=cpus, dashboard_agent_listen_port=free_port())
            ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
            yield Head(f"http://{cluster.webui_url}", cluster)
        finally:
            ray.shutdown()
            if cluster is not None:
                cluster.shutdown()
            for process in descendants(token):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


class Wire:
    """Passes TCP connections on to ``url``'s port, until they are cut. A context manager."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.connections = 0
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Ends all connections there are; new ones can be made."""
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self.connections += 1
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
