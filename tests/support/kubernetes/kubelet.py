"""A kubelet whose containers are processes: it knows nothing but pods, and speaks to nobody but the API."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.dashboard import free_port
from tests.support.kubernetes.client import Api
from tests.support.kubernetes.containers import Container, environment_of, expanded
from tests.support.kubernetes.objects import Object


@dataclass
class Running:
    """A pod that was started here. ``deadline``: when what still lives of it is killed."""

    containers: dict[str, Container]
    deadline: float | None = None

    @property
    def over(self) -> bool:
        return all(container.exit_code is not None for container in self.containers.values())

    def kill(self) -> None:
        for container in self.containers.values():
            container.kill()


class Kubelet:
    """Runs the pods that name ``node``. ``sync`` is to be called again and again; at the end of its context
    every process that it started is gone. Images, volumes, probes and limits mean nothing to it.

    ``environment`` is what every container finds, and in ``SCRATCH`` a folder of its pod's own, with a short
    path; ``address`` is the one that all pods share, so ``PORT_1`` to ``PORT_4`` are a pod's own ports.
    """

    def __init__(
        self, api: Api, node: str, address: str, folder: Path, environment: Mapping[str, str]
    ) -> None:
        self._api, self._node, self._address = api, node, address
        self._folder, self._environment = folder, environment
        self._running: dict[str, Running] = {}
        self._started = 0
        self._lock = threading.RLock()

    def __enter__(self) -> Kubelet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            for running in self._running.values():
                running.kill()

    def sync(self) -> None:
        pods = {pod["metadata"]["name"]: pod for pod in self._api.pods.all()}
        with self._lock:
            for name, pod in pods.items():
                if pod["spec"].get("nodeName") == self._node:
                    self._sync_pod(name, pod)
            for name in set(self._running) - set(pods):  # deleted by force
                self._running.pop(name).kill()

    def lose(self, name: str) -> None:
        """SIGKILL to every process of a pod at once, as when its machine is taken away."""
        with self._lock:
            self._running[name].kill()

    def _sync_pod(self, name: str, pod: Object) -> None:
        running = self._running.get(name)
        if "deletionTimestamp" in pod["metadata"]:
            self._see_off(name, pod, running)
        elif running is None and pod["status"].get("phase") == "Pending":
            self._start(name, pod)
        elif running is not None and running.over and pod["status"].get("phase") == "Running":
            running.kill()
            self._api.pods.set_status(name, self._status("Failed", running))

    def _start(self, name: str, pod: Object) -> None:
        running = self._running[name] = Running({})
        self._started += 1
        own = {**self._environment, "SCRATCH": str(self._folder / str(self._started))}
        own.update({f"PORT_{number}": str(free_port()) for number in range(1, 5)})
        for container in pod["spec"]["containers"]:
            environment = {**own, **environment_of(pod, container, self._address)}
            log = self._folder / f"{name}.{container['name']}.log"
            command = expanded(container["command"], environment)
            running.containers[container["name"]] = Container(command, environment, log)
        self._api.pods.set_status(name, self._status("Running", running))

    def _see_off(self, name: str, pod: Object, running: Running | None) -> None:
        """SIGTERM, the grace period, SIGKILL; then the pod is no more."""
        if running is not None and not running.over:
            if running.deadline is None:
                running.deadline = time.monotonic() + pod["metadata"].get("deletionGracePeriodSeconds", 30)
                for container in running.containers.values():
                    container.terminate()
            if time.monotonic() < running.deadline:
                return
        if running is not None:
            running.kill()
            del self._running[name]
        self._api.pods.delete(name, grace=0)

    def _status(self, phase: str, running: Running) -> Object:
        return {
            "phase": phase,
            "hostIP": self._address,
            "podIP": self._address,
            "podIPs": [{"ip": self._address}],
            "containerStatuses": [
                {
                    "name": name,
                    "image": "process",
                    "imageID": "",
                    "ready": container.exit_code is None,
                    "restartCount": 0,
                    "state": _state(container),
                }
                for name, container in running.containers.items()
            ],
        }


def _state(container: Container) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if container.exit_code is None:
        return {"running": {"startedAt": now}}
    return {"terminated": {"exitCode": container.exit_code, "finishedAt": now}}
