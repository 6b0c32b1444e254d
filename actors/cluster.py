"""A run's actors on a Ray cluster, and the cluster itself where none is given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.ray_controller import ControllerActor, RunSettings
from actors.ray_worker import WorkerActor
from actors.recorder import Progress
from runtime.plan import Plan, WorkerId
from runtime.protocol import Measured
from runtime.settings import ray_address
from strategies.job import Job

END_SECONDS = 30.0
"""How long the actors may take to leave by themselves at the end of a run."""


@contextmanager
def connect(
    address: str | None, workers: int, cpus_per_worker: float, gpus_per_worker: float
) -> Iterator[None]:
    """Joins the Ray cluster at ``address``, else the one that this process is part of or was started
    for (a submitted job's), else starts a local one.

    What was started or joined here is left again at the end. Raises ValueError if there is no
    cluster at ``address``.
    """
    if ray.is_initialized():
        yield
        return
    address = address or ray_address()
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                address="local",
                num_cpus=max(1, math.ceil(workers * cpus_per_worker)),
                num_gpus=None if gpus_per_worker else 0,
                include_dashboard=False,
                _system_config={"worker_niceness": 0},  # nobody else lives on a cluster of our own
                **quiet,
            )
    except ConnectionError as error:
        raise ValueError(f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        ray.shutdown()


class RayRun:
    """One run's controller and workers. A context manager: at its end no actor is left."""

    def __init__(
        self, job: Job, settings: RunSettings, secret: bytes, cpus_per_worker: float, gpus_per_worker: float
    ) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        controller = ray.remote(ControllerActor).options(
            num_cpus=0, max_concurrency=8, scheduling_strategy=here
        )
        worker = ray.remote(WorkerActor).options(
            num_cpus=cpus_per_worker, num_gpus=gpus_per_worker, scheduling_strategy="SPREAD"
        )
        # actor handles get their methods at run time, so they have no useful static type
        self._controller: Any = controller.remote(job, settings, secret)
        self._workers: dict[WorkerId, Any] = {
            number: worker.remote(number, job, secret) for number in range(settings.workers)
        }
        self._ended: Any = None

    def __enter__(self) -> RayRun:
        self._ended = self._controller.run.remote(self._workers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in [*self._workers.values(), self._controller]:
            with suppress(RayActorError):
                ray.kill(actor)

    def metrics_port(self) -> int | None:
        """Raises ValueError if the metrics cannot be served where the recipe wants them."""
        try:
            port: int | None = ray.get(self._controller.metrics_port.remote())
        except RayActorError as error:
            raise ValueError(_cause(error)) from None
        return port

    def progress(self, steps_seen: int, events_seen: int) -> Progress:
        progress: Progress = ray.get(self._controller.progress.remote(steps_seen, events_seen))
        return progress

    def badput(self) -> Mapping[str, float]:
        badput: Mapping[str, float] = ray.get(self._controller.badput.remote())
        return badput

    def processes(self) -> Mapping[WorkerId, int]:
        """The workers' process ids, once they are ready."""
        processes: Mapping[WorkerId, int] = ray.get(self._controller.processes.remote())
        return processes

    def plan(self) -> Plan | None:
        """The newest plan; None before the first."""
        plan: Plan | None = ray.get(self._controller.plan.remote())
        return plan

    def measured(self) -> Mapping[WorkerId, Measured]:
        """What each worker measured in its newest step."""
        measured: Mapping[WorkerId, Measured] = ray.get(self._controller.measured.remote())
        return measured

    def stop(self) -> None:
        """Asks the run to end at the next step boundary, with a checkpoint."""
        self._controller.stop.remote()

    def wait(self, seconds: float) -> bool:
        """Whether the run has ended, after waiting for it at most that long."""
        return bool(ray.wait([self._ended], timeout=seconds)[0])

    def finish(self) -> None:
        """Waits for the end. Raises ValueError for a mistake of the user that only the workers found."""
        try:
            ray.get(self._ended, timeout=END_SECONDS)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise ValueError(str(error.cause)) from None
            raise
        except GetTimeoutError:
            return


def _cause(error: BaseException) -> str:
    """The user's part of an error that Ray wrapped in a traceback."""
    return str(error).rstrip().splitlines()[-1].removeprefix("ValueError: ")
