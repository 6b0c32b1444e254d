"""The Ray actor around a worker: one accelerator, or one CPU slot with a fixed number of threads."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import ray
import torch

from actors.worker import Worker
from runtime.allocator import keep_freed_memory
from runtime.fabric.interface import ControlCallback, LostCallback
from runtime.fabric.sockets import SocketEndpoint
from runtime.layout import Layout
from runtime.plan import CONTROLLER, WorkerId
from strategies.job import Job
from strategies.profile import Profile

SWITCH_INTERVAL = 5e-4
"""Seconds. Python's default of 5 ms would make the fabric's thread wait that long for a busy worker."""


@dataclass(frozen=True, slots=True)
class Ready:
    """What the controller needs to know of a worker that is warmed up."""

    address: str
    domain: str
    process: int
    layout: Layout
    profile: Profile
    data: str | None
    """A digest of the data's contents, where the data set has one."""


class WorkerActor:
    """``start`` warms the worker up; ``run`` returns when the controller sends it away."""

    def __init__(self, worker: WorkerId, job: Job, secret: bytes) -> None:
        self._id, self._job, self._secret = worker, job, secret

    def start(self, controller: str) -> Ready:
        """Builds model and data, runs every layer once. Raises ValueError for a model that cannot be
        trained layer by layer."""
        sys.setswitchinterval(SWITCH_INTERVAL)
        keep_freed_memory()
        torch.set_num_threads(self._job.threads)
        self._worker = Worker(self._id, self._job, self._make_endpoint, assigned_device())
        self._worker.endpoint.connect({CONTROLLER: controller})
        return Ready(
            address=self._worker.endpoint.address,
            domain=ray.get_runtime_context().get_node_id(),
            process=os.getpid(),
            layout=self._worker.layout,
            profile=self._worker.profile,
            data=getattr(self._worker.data, "digest", None),
        )

    def _make_endpoint(self, on_control: ControlCallback, on_lost: LostCallback) -> SocketEndpoint:
        return SocketEndpoint(
            self._id,
            self._secret,
            host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            on_control=on_control,
            on_lost=on_lost,
            inbox_limit_bytes=self._job.inbox_limit_bytes,
        )

    def run(self) -> str:
        return self._worker.run()


def assigned_device() -> torch.device:
    """The GPU that Ray assigned to this process (a fraction counts too), else the CPU."""
    if torch.cuda.is_available() and ray.get_gpu_ids():
        torch.cuda.set_device(0)  # Ray shows the process its own GPUs only
        return torch.device("cuda", 0)
    return torch.device("cpu")
