"""The workers of a run as Ray actors: asking for them, watching them, seeing them off.

They are named and detached, so that they outlive a controller that dies; the next one finds them by name.
A run that nobody controls any more ends by itself (``Job.orphan_seconds``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from actors.names import LEFT_NODE, NAMESPACE, NODE_LABEL, UNAVAILABLE_SECONDS, first_line, worker_name
from actors.ray_worker import WATCHERS, Ready, WorkerActor
from runtime.plan import WorkerId
from runtime.signals import Drain, Input, Joined, Lost
from strategies.job import Job

DRAIN_POLL_SECONDS = 0.5

WATCH_SECONDS = 10.0
"""How long one call waits for a worker's end: it holds a thread there, also when its caller dies."""

LEAVE_SECONDS = 2.0
"""How long a worker may take to leave by itself."""

ANSWER_SECONDS = 5.0
"""How long workers may take to answer a controller that was started anew."""


@dataclass(frozen=True, slots=True)
class Place:
    """What one worker takes up. ``resources`` are Ray's custom ones."""

    cpus: float
    gpus: float
    resources: tuple[tuple[str, float], ...] = ()


class RayCrew:
    """``actors.host.Crew`` on Ray. ``post`` takes what happens to the controller; ``asked_for`` hears of
    every id before Ray is asked for a worker of that id.

    One thread a worker waits for Ray's word on it; all are daemons and end with the process.
    """

    def __init__(
        self,
        run: str,
        job: Job,
        secret: bytes | None,
        place: Place,
        controller: WorkerId,
        address: str,
        post: Callable[[Input], None],
        check: Callable[[WorkerId, Ready], str | None],
        asked_for: Callable[[WorkerId], None],
    ) -> None:
        self._run, self._job, self._secret, self._place = run, job, secret, place
        self._controller, self._address = controller, address
        self._post, self._check, self._asked_for = post, check, asked_for
        self._handles: dict[WorkerId, Any] = {}
        self.domains: dict[WorkerId, str] = {}
        self.processes: dict[WorkerId, int] = {}
        self._gone: set[WorkerId] = set()
        self.avoided: set[str] = set()
        """Ray nodes, by id, on which no further worker of this run is to be placed."""

    # The first ones, whom the run is formed of.

    def create(self, worker: WorkerId) -> Any:
        """Asks Ray for an actor; it is placed when there is room."""
        self._asked_for(worker)
        return self._create(worker)

    def _create(self, worker: WorkerId) -> Any:
        place = self._place
        remote: Any = ray.remote
        actor: Any = remote(concurrency_groups=WATCHERS)(WorkerActor)
        handle: Any = actor.options(
            name=worker_name(self._run, worker),
            namespace=NAMESPACE,
            lifetime="detached",
            max_concurrency=4,
            num_cpus=place.cpus,
            num_gpus=place.gpus,
            resources=dict(place.resources) or None,
            scheduling_strategy="SPREAD",
            label_selector={NODE_LABEL: f"!in({','.join(sorted(self.avoided))})"} if self.avoided else None,
        ).remote(worker, self._job, self._secret)
        self._handles[worker] = handle
        return handle.start.remote(self._controller, self._address)

    def welcome(self, worker: WorkerId, ready: Ready) -> None:
        """A worker is ready: tells the controller, and watches it from now on."""
        self.domains[worker], self.processes[worker] = ready.domain, ready.process
        profile = ready.profile
        self._post(Joined(worker, ready.domain, ready.address, profile.forward, profile.backward))
        if ready.domain in self.avoided:  # it was on its way there when the node was to be left
            self._post(Drain(worker, LEFT_NODE))
        threading.Thread(target=self._watch, args=(worker,), daemon=True).start()

    def expect(self, worker: WorkerId, reference: Any) -> None:
        """A worker that was created will be ready some day: it then joins as one that was hired."""
        threading.Thread(target=self._await, args=(worker, lambda: reference), daemon=True).start()

    # ``Crew``.

    def hire(self, worker: WorkerId) -> None:
        self._asked_for(worker)
        asked = partial(self._create, worker)
        threading.Thread(target=self._await, args=(worker, asked), daemon=True).start()

    def dismiss(self, worker: WorkerId) -> None:
        threading.Thread(target=self._end, args=(worker,), daemon=True).start()

    def _await(self, worker: WorkerId, asked: Callable[[], Any]) -> None:
        """As long as Ray has no room for it: that is no failure, and what has an autoscaler bring nodes.
        ``asked`` returns the reference to wait for; what it raises is that the worker could not start."""
        try:
            ready: Ready = ray.get(asked())
        except Exception as error:
            died = isinstance(error, ActorDiedError)
            self._post(Lost(worker, ("" if died else "could not start: ") + first_line(error)))
            self._kill(worker)
            return
        problem = self._check(worker, ready)
        if problem is not None:
            self._post(Lost(worker, problem))
            self._kill(worker)
            return
        self.welcome(worker, ready)

    def _watch(self, worker: WorkerId) -> None:
        while True:
            try:
                while not ray.get(self._handles[worker].ended.remote(WATCH_SECONDS)):
                    pass
            except ActorUnavailableError:
                # Ray itself does not know yet; if it lives but is cut off, its heartbeats will tell
                time.sleep(UNAVAILABLE_SECONDS)
                continue
            except RayActorError:
                self._post(Lost(worker, "process died"))
            except RayTaskError as error:
                self._post(Lost(worker, f"raised {first_line(error)}"))
            self._kill(worker)
            return

    def _end(self, worker: WorkerId) -> None:
        """Lets the worker leave by itself, which takes no time if it lives, and ends its process."""
        handle = self._handles.get(worker)
        if handle is not None:
            with suppress(GetTimeoutError, RayActorError, RayTaskError):
                ray.get(handle.ended.remote(LEAVE_SECONDS), timeout=LEAVE_SECONDS)
        self._kill(worker)
        self._post(Lost(worker, "ended"))

    def _kill(self, worker: WorkerId) -> None:
        handle = self._handles.get(worker)
        if handle is not None and worker not in self._gone:
            self._gone.add(worker)
            ray.kill(handle)

    # A controller that was started anew.

    def adopt(self) -> tuple[WorkerId, ...]:
        """The workers of this run that are warmed up, found by name, ascending.

        Ends all others: those that were on their way when nobody waited for them any more, and those that
        do not answer.
        """
        from ray._private.state import state  # Ray has no public way to ask

        asked: dict[Any, WorkerId] = {}
        for worker, name in worker_names(self._run).items():
            with suppress(ValueError):  # it died just now
                handle = self._handles[worker] = ray.get_actor(name, namespace=NAMESPACE)
                if state.actor_table(handle._actor_id.hex()).get("State") == "ALIVE":
                    asked[handle.is_warm.remote()] = worker
        found = []
        for reference in _answered(list(asked), ANSWER_SECONDS):
            with suppress(RayActorError):
                if ray.get(reference):
                    found.append(asked[reference])
        for worker in set(self._handles) - set(found):
            self._kill(worker)
        return tuple(sorted(found))

    def attach(self, worker: WorkerId) -> Any:
        """Asks an adopted worker to say where it stands."""
        return self._handles[worker].attach.remote(self._controller, self._address)

    def keep(self, worker: WorkerId, ready: Ready) -> None:
        """An adopted worker has answered: watches it from now on."""
        self.domains[worker], self.processes[worker] = ready.domain, ready.process
        threading.Thread(target=self._watch, args=(worker,), daemon=True).start()

    # Notices.

    def leave_node(
        self, node: str, at_work: Iterable[WorkerId], deadline: float | None
    ) -> tuple[WorkerId, ...]:
        """Tells all workers on a Ray node to leave, and places no further one there. Returns those of
        ``at_work`` who were told.

        ``node`` is an id or how one begins. Raises ValueError if none of ``at_work`` is there.
        """
        domains = {worker: self.domains[worker] for worker in at_work}
        found = {domain for domain in domains.values() if domain.startswith(node)}
        if len(found) != 1:
            placed = ", ".join(f"{worker} on {domain[:12]}" for worker, domain in sorted(domains.items()))
            what = "several nodes have an id" if found else "no worker of the run is on a node with an id"
            raise ValueError(f"{what} that begins with {node}: its workers are {placed or 'none yet'}")
        self.avoided |= found
        told = [worker for worker, domain in list(self.domains.items()) if domain in found]
        for worker in told:  # those in reserve too; who has gone already is not heard of again
            self._post(Drain(worker, LEFT_NODE, deadline))
        return tuple(worker for worker in told if worker in domains)

    def emptied(self) -> frozenset[str]:
        """The Ray nodes, by id, that this run's workers have been on and are on no more; none while there is
        no worker at all, for then there is no other node to go to."""
        domains, gone = dict(self.domains), set(self._gone)
        peopled = {domain for worker, domain in domains.items() if worker not in gone}
        return frozenset(domains.values()) - peopled if peopled else frozenset()

    def watch_drains(self) -> None:
        """Tells of workers on nodes that Ray is draining, until the process ends. Runs in its own thread."""
        from ray._private.state import state  # Ray has no public way to ask

        told: set[WorkerId] = set()
        waiting = threading.Event()
        while not waiting.wait(DRAIN_POLL_SECONDS):
            try:
                draining = state.get_draining_nodes()
            except Exception:  # the head is away; workers go on without it
                continue
            for worker, domain in list(self.domains.items()):
                if domain in draining and worker not in told:
                    told.add(worker)
                    self._post(Drain(worker, "its node is being drained", _seconds_until(draining[domain])))


def _answered(references: list[Any], seconds: float) -> list[Any]:
    """Those of ``references`` that are there within ``seconds``."""
    if not references:
        return []
    ready: list[Any] = ray.wait(references, num_returns=len(references), timeout=seconds)[0]
    return ready


def _seconds_until(deadline_ms: int) -> float | None:
    return max(0.0, deadline_ms / 1e3 - time.time()) if deadline_ms else None


def worker_names(run: str) -> dict[WorkerId, str]:
    """The names of a run's living workers."""
    prefix = f"{run}/worker-"
    names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)]
    return {int(name.removeprefix(prefix)): name for name in names if name.startswith(prefix)}


def end_all(run: str) -> None:
    """Ends every worker of a run."""
    for name in worker_names(run).values():
        with suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
