"""A run's actors on a Ray cluster, and the cluster itself where none is given.

Commands that ask a run something, or curate, import this: what starts a run, and PyTorch with it, is imported
where a run is started.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.names import NAMESPACE, controller_name, controller_pattern, run_of
from runtime.fabric.secret import secret_to_hand_out
from runtime.plan import Plan, WorkerId
from runtime.settings import ray_address

if TYPE_CHECKING:
    from actors.recorder import RunProgress
    from actors.run_settings import RunSettings
    from runtime.protocol import Measured
    from strategies.job import Job

END_SECONDS = 30.0
"""How long the actors may take to leave by themselves at the end of a run."""

LONGEST_CALL = 1.0
"""Seconds that a call of the controller may wait for something."""


@contextmanager
def connect(
    address: str | None,
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    *,
    more_cpus: float = 0.0,
    kept_processes: int | None = None,
) -> Iterator[None]:
    """Joins the Ray cluster at ``address``, else the one that this process is part of or was started
    for (a submitted job's), else starts a local one.

    ``more_cpus`` are for what is no worker; ``kept_processes``: how many idle ones a Ray that is started
    keeps for tasks to come (None: one a CPU). What was started or joined here is left again at the end.
    Raises ValueError if there is no cluster at ``address``.
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
                num_cpus=max(1, math.ceil(workers * cpus_per_worker + more_cpus)),
                num_gpus=None if gpus_per_worker else 0,
                include_dashboard=False,
                _system_config={
                    "worker_niceness": 0,  # nobody else lives on a cluster of our own
                    **({} if kept_processes is None else {"num_workers_soft_limit": kept_processes}),
                },
                **quiet,
            )
    except ConnectionError as error:
        raise ValueError(f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        ray.shutdown()


def gcs_address() -> str:
    """Where others reach the cluster that this process is connected to."""
    address: str = ray.get_runtime_context().gcs_address
    return address


class RayRun:
    """A run's controller, as its driver sees it. A context manager: at its end no actor is left, unless the
    run is ``detached``.

    Calls wait while a controller that died is being started again, and raise ConnectionError where Ray starts
    none any more.
    """

    def __init__(self, job: Job, settings: RunSettings, *, detached: bool = False) -> None:
        from actors.ray_controller import ControllerActor

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        controller = ray.remote(ControllerActor).options(
            name=controller_name(settings.name),
            namespace=NAMESPACE,
            lifetime="detached" if detached else None,
            num_cpus=0,
            memory=1,  # Ray puts an actor that asks for nothing anywhere, whatever its strategy says
            max_concurrency=8,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=here,
        )
        self.name = settings.name
        self._detached = detached
        # actor handles get their methods at run time, so they have no useful static type
        self._controller: Any = controller.remote(job, settings, secret_to_hand_out())

    @classmethod
    def find(cls, name: str) -> RayRun:
        """The run called ``name`` on the cluster that this process is connected to; it goes on when this
        process lets go of it. Raises ValueError if there is none."""
        run = cls.__new__(cls)
        run.name, run._detached = name, True
        try:
            run._controller = ray.get_actor(controller_name(name), namespace=NAMESPACE)
        except ValueError:
            raise ValueError(f"the run {name} is not under way on this Ray cluster: it has ended") from None
        return run

    def __enter__(self) -> RayRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._detached:
            self.end()

    def end(self) -> None:
        """Ends all actors of the run at once."""
        from actors.crew import end_all

        with suppress(RayActorError):
            ray.kill(self._controller)
        end_all(self.name)

    def metrics_port(self) -> int | None:
        """Raises ValueError if the metrics cannot be served where the recipe wants them."""
        try:
            port: int | None = ray.get(self._controller.metrics_port.remote())
        except RayActorError as error:
            raise ValueError(_cause(error)) from None
        return port

    def progress(self, steps_seen: int, events_seen: int) -> RunProgress:
        progress: RunProgress = _patiently(lambda: self._controller.progress.remote(steps_seen, events_seen))
        return progress

    def badput(self) -> Mapping[str, float]:
        badput: Mapping[str, float] = _patiently(self._controller.badput.remote)
        return badput

    def piece(self, name: str, offset: int) -> bytes | None:
        """A piece of the run's record, as ``RunFolder.piece`` on the controller's machine."""
        piece: bytes | None = _patiently(lambda: self._controller.piece.remote(name, offset))
        return piece

    def processes(self) -> Mapping[WorkerId, int]:
        """The workers' process ids, once they are ready; lost ones among them."""
        processes: Mapping[WorkerId, int] = _patiently(self._controller.processes.remote)
        return processes

    def feed_processes(self) -> Mapping[int, int]:
        """The feed workers' process ids, once they are ready."""
        processes: Mapping[int, int] = _patiently(self._controller.feed_processes.remote)
        return processes

    def domains(self) -> Mapping[WorkerId, str]:
        """The ids of the workers' Ray nodes, likewise."""
        domains: Mapping[WorkerId, str] = _patiently(self._controller.domains.remote)
        return domains

    def controller_process(self) -> int:
        """The controller's process id."""
        process: int = _patiently(self._controller.process.remote)
        return process

    def controller_node(self) -> str:
        """The id of the controller's Ray node."""
        node: str = _patiently(self._controller.node.remote)
        return node

    def plan(self) -> Plan | None:
        """The newest plan; None before the first."""
        plan: Plan | None = _patiently(self._controller.plan.remote)
        return plan

    def measured(self) -> Mapping[WorkerId, Measured]:
        """What each worker measured in its newest step."""
        measured: Mapping[WorkerId, Measured] = _patiently(self._controller.measured.remote)
        return measured

    def stop(self) -> None:
        """Asks the run to end at the next step boundary, with a checkpoint."""
        self._controller.stop.remote()

    def drain(self, worker: WorkerId, reason: str, deadline: float | None = None) -> bool:
        """Has a worker leave at the next step boundary; False if it has no work in this run."""
        found: bool = _patiently(lambda: self._controller.drain.remote(worker, reason, deadline))
        return found

    def drain_node(self, node: str, deadline: float | None = None) -> tuple[WorkerId, ...]:
        """Has all workers on the Ray node whose id begins with ``node`` leave; returns those who have work.

        No further one is placed there. Raises ValueError if nobody who has work is there.
        """
        told: tuple[WorkerId, ...] = _heeding(lambda: self._controller.drain_node.remote(node, deadline))
        return told

    def resize(self, workers: int) -> None:
        """Aims for so many workers from now on. Raises ValueError if the recipe does not allow that."""
        _heeding(lambda: self._controller.resize.remote(workers))

    def wait(self, seconds: float) -> bool:
        """Whether the run has ended, after waiting for it at most that long."""
        deadline = time.monotonic() + seconds
        ended = False
        while not ended and (left := deadline - time.monotonic()) > 0:
            # in short calls: each holds one of the controller's threads, also when its caller dies
            call = partial(self._controller.ended.remote, min(left, LONGEST_CALL))
            try:
                ended = _patiently(call)
            except RayTaskError:
                ended = True  # ``finish`` tells why
        return ended

    def finish(self) -> None:
        """Waits for the end. Raises ValueError for a mistake of the user that only the workers found."""
        _heeding(lambda: self._controller.ended.remote(END_SECONDS))


def _patiently(call: Callable[[], Any]) -> Any:
    """The answer of an actor that may be on its way back."""
    while True:
        try:
            return ray.get(call())
        except ActorUnavailableError:
            continue
        except ActorDiedError as error:
            raise ConnectionError(
                f"the run's controller is gone and Ray starts no other ({_cause(error)}): if the run had not "
                "ended, go on with it by --resume"
            ) from None


def _heeding(call: Callable[[], Any]) -> Any:
    """As ``_patiently``, where the actor may find that what is asked of it is a mistake."""
    try:
        return _patiently(call)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from None
        raise


def run_called(name: str) -> str:
    """The full name of the run under way on this cluster whose folder is called ``name``.

    Raises ValueError if there is none, or more than one.
    """
    found = [
        run_of(entry["name"])
        for entry in ray.util.list_named_actors(all_namespaces=True)
        if entry["namespace"] == NAMESPACE and re.fullmatch(controller_pattern(name), entry["name"])
    ]
    if len(found) != 1:
        what = "several runs are called so" if found else "no run under way on this Ray cluster is called so"
        raise ValueError(f"{name}: {what}: name the folder of a run that has not ended")
    return found[0]


def _cause(error: BaseException) -> str:
    """The user's part of an error that Ray wrapped in a traceback."""
    return str(error).rstrip().splitlines()[-1].removeprefix("ValueError: ")
