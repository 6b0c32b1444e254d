"""The Ray actor around a worker: one accelerator, or one CPU slot with a fixed number of threads.

The controller names the actor's class and computes nothing: what computes (``actors.workshop``), and with it
PyTorch, is imported where a worker is made.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import ray

from actors.names import run_of
from actors.naps import Naps
from runtime.allocator import keep_freed_memory, without_garbage
from runtime.fabric.interface import ControlCallback, EndpointClosed, LostCallback
from runtime.fabric.secret import secret_of
from runtime.fabric.sockets import SocketEndpoint
from runtime.layout import Layout
from runtime.plan import WorkerId
from strategies.job import Job
from strategies.profile import Profile

if TYPE_CHECKING:
    from actors.worker import Worker

SWITCH_INTERVAL = 5e-4
"""Seconds. Python's default of 5 ms would make the fabric's thread wait that long for a busy worker."""

WATCH = "watch"
WATCHERS = {WATCH: 4}
"""The actor's threads for those who wait for the worker's end."""

TERM_SECONDS = 30.0
"""What a process that gets SIGTERM usually has until SIGKILL (Kubernetes' default grace period)."""


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
    """``start`` warms the worker up and sets it going; ``ended`` tells when it has been sent away.

    The work is done by a thread of the actor's own, not by a call of the controller's: the controller may
    die and come back meanwhile. ``attach`` then introduces the new one.

    Calls that wait have threads of their own (``WATCHERS``): a controller that died leaves its last ones
    behind, and the next one must not wait for them.
    """

    def __init__(self, worker: WorkerId, job: Job, secret: bytes | None) -> None:
        self._run = run_of(ray.get_runtime_context().get_actor_name() or "")
        self._id, self._job, self._secret = worker, job, secret
        self._worker: Worker | None = None
        self._ended = threading.Event()
        self._error: BaseException | None = None
        # Ray runs __init__ in the main thread, the only one that may do this
        self._naps = Naps(job.beat_seconds)
        signal.signal(signal.SIGTERM, self._terminated)
        with without_garbage():
            from actors.workshop import new_worker
        self._new_worker = new_worker

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        worker = self._worker
        if worker is None or self._ended.is_set():
            os._exit(0)
        # a signal handler must not wait for locks that the interrupted thread may hold
        threading.Thread(target=worker.notice, args=("SIGTERM", TERM_SECONDS), daemon=True).start()

    def start(self, controller: WorkerId, address: str) -> Ready:
        """Builds model and data, runs every layer once. Raises ValueError for a model that cannot be
        trained layer by layer, or where this node lacks the fabric's secret."""
        sys.setswitchinterval(SWITCH_INTERVAL)
        keep_freed_memory()
        worker = self._new_worker(
            self._id,
            self._job,
            self._run,
            self._make_endpoint,
            domain=ray.get_runtime_context().get_node_id(),
            controller=controller,
            on_beat=self._naps.again,
        )
        worker.endpoint.connect({controller: address})
        self._worker = worker
        threading.Thread(target=self._live, args=(worker,), name=f"worker-{self._id}", daemon=True).start()
        return self._ready(worker)

    def is_warm(self) -> bool:
        """Whether ``start`` has come to its end, and the work has not."""
        return self._worker is not None and not self._ended.is_set()

    def wait_on(self) -> None:
        """There is a new controller, which will ``attach`` this worker soon."""
        if self._worker is not None:
            self._worker.wait_on()

    def attach(self, controller: WorkerId, address: str) -> Ready | None:
        """Introduces a new controller; None if this worker has not come so far that it matters."""
        worker = self._worker
        if worker is None or self._ended.is_set():
            return None
        worker.attach(controller, address)
        return self._ready(worker)

    def _ready(self, worker: Worker) -> Ready:
        return Ready(
            address=worker.endpoint.address,
            domain=worker.domain,
            process=os.getpid(),
            layout=worker.layout,
            profile=worker.profile,
            data=getattr(worker.data, "digest", None),
        )

    def _make_endpoint(self, on_control: ControlCallback, on_lost: LostCallback) -> SocketEndpoint:
        return SocketEndpoint(
            self._id,
            secret_of(self._run, self._secret),
            host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
            on_control=on_control,
            on_lost=on_lost,
            inbox_limit_bytes=self._job.inbox_limit_bytes,
        )

    def _live(self, worker: Worker) -> None:
        try:
            with suppress(EndpointClosed):
                worker.run()
        except BaseException as error:  # for whoever watches
            self._error = error
        self._ended.set()
        if worker.abandoned:
            os._exit(0)  # there is nobody left to end this process

    @ray.method(concurrency_group=WATCH)
    def ended(self, seconds: float) -> bool:
        """Whether the worker's work has come to its end, after waiting for that at most so long. Raises what
        it raised."""
        if not self._ended.wait(seconds):
            return False
        if self._error is not None:
            raise self._error
        return True
