"""Feed workers: Ray actors on CPUs that prepare micro-batches before the workers that train need them.

Actors, not Ray tasks: a process opens the set once and keeps it, and a call goes straight to the process. On
one CPU, with eight reads asked for ahead, a micro-batch of 16 images of 64 x 64 took 10.1 to 11.5 ms by an
actor and 11.5 to 16.2 ms by tasks whose process kept the set (three turns each; of all cores 13.4 and 14.2
ms).

They belong to the controller and end with it. Ray starts one again whose process dies; meanwhile the workers
ask the others, or read by themselves. Nodes that the run's workers have left are left by them too, so that an
autoscaler can take such nodes back.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)

from actors.names import LEFT_NODE, NAMESPACE, NODE_LABEL, UNAVAILABLE_SECONDS, feed_name, first_line
from runtime.events import Event, FeedWorkerLost, FeedWorkerReplaced
from runtime.hiring import FIRST_PAUSE, LONGEST_PAUSE
from strategies.job import Job
from strategies.reading import Wanted

if TYPE_CHECKING:
    from actors.prefetch import Prepared

LOOK_SECONDS = 1.0
"""Between two looks at whether a feed worker's node has been left by the workers."""

EMPTY_SECONDS = 10.0
"""How long a node may be without workers before its feed workers leave: mostly a lost one is replaced by
then."""

PLACE_SECONDS = 60.0
"""How long a feed worker may take to be placed and to open the data before that is said."""


@dataclass(frozen=True, slots=True)
class FeedReady:
    """``data`` is a digest of the data's contents, where the data set has one; ``node`` is Ray's id."""

    process: int
    node: str
    data: str | None


class FeedActor:
    """Prepares what it is asked for, one read after the other."""

    def __init__(self, job: Job) -> None:
        # the controller, which names this class, does without PyTorch
        import torch

        from actors.prefetch import prepare

        torch.set_num_threads(1)
        self._data, self._prepare = job.build_data(), prepare
        self._forever = threading.Event()

    def ready(self) -> FeedReady:
        node = ray.get_runtime_context().get_node_id()
        return FeedReady(os.getpid(), node, getattr(self._data, "digest", None))

    @ray.method(concurrency_group="watch")
    def watch(self) -> None:
        """Never returns."""
        self._forever.wait()

    def prepare(self, wanted: Sequence[Wanted]) -> list[Prepared]:
        return self._prepare(self._data, wanted)


class FeedCrew:
    """A run's feed workers, as its controller sees them. ``note`` takes events, ``step`` is that under way,
    ``emptied`` are the Ray nodes that the run's workers have left.

    One thread a feed worker waits for Ray's word on it; all are daemons and end with the process.
    """

    def __init__(
        self,
        run: str,
        job: Job,
        cpus: float,
        note: Callable[[Event], None],
        step: Callable[[], int],
        emptied: Callable[[], frozenset[str]],
        empty_seconds: float = EMPTY_SECONDS,
    ) -> None:
        self._run, self._job, self._cpus = run, job, cpus
        self._note, self._step, self._emptied = note, step, emptied
        self._empty_seconds = empty_seconds
        self._handles: dict[int, Any] = {}
        self._ended = threading.Event()
        self.processes: dict[int, int] = {}

    def start(self) -> None:
        """Asks for all; does not wait for any."""
        for number in range(self._job.feed_workers):
            threading.Thread(target=self._tend, args=(number,), name=f"feed-{number}", daemon=True).start()

    def end(self) -> None:
        self._ended.set()
        for handle in list(self._handles.values()):
            with suppress(RayError):
                ray.kill(handle)

    def _tend(self, number: int) -> None:
        handle = self._create(number)
        if handle is None:
            return
        lost_at: float | None = None
        moved = False
        pause = FIRST_PAUSE
        while not self._ended.is_set() and handle is not None:
            try:
                ready = ray.get(handle.ready.remote(), timeout=PLACE_SECONDS)
            except GetTimeoutError:
                if lost_at is None:
                    lost_at = time.monotonic()
                    self._lost(number, f"no answer within {PLACE_SECONDS:.0f} s: is there a CPU for it?")
                if moved:  # by now there may be other nodes
                    handle = self._elsewhere(number)
                continue
            except RayError as error:
                if lost_at is None:
                    lost_at = time.monotonic()
                    self._lost(number, _why(error))
                if isinstance(error, ActorDiedError):  # for good: it could not open the data
                    self._ended.wait(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                    handle = self._elsewhere(number) if moved else self._anew(number)
                else:
                    self._ended.wait(UNAVAILABLE_SECONDS)
                continue
            pause = FIRST_PAUSE
            self.processes[number] = ready.process
            if lost_at is not None:
                self._note(FeedWorkerReplaced(self._step(), number, time.monotonic() - lost_at))
                lost_at = None
            try:
                self._watch(handle, ready.node)
                if not self._ended.is_set():
                    lost_at, moved = self._lost(number, LEFT_NODE), True
                    handle = self._elsewhere(number)
            except ActorUnavailableError:
                lost_at = self._lost(number, "process died")
            except RayError as error:
                lost_at = self._lost(number, _why(error))

    def _watch(self, handle: Any, node: str) -> None:
        """Returns when its node has been left by the workers; raises what Ray says of its end."""
        watching = handle.watch.remote()
        empty_since: float | None = None
        while not self._ended.is_set():
            if ray.wait([watching], timeout=LOOK_SECONDS)[0]:
                ray.get(watching)
            if node not in self._emptied():
                empty_since = None
            elif empty_since is None:
                empty_since = time.monotonic()
            elif time.monotonic() - empty_since > self._empty_seconds:
                return

    def _elsewhere(self, number: int) -> Any:
        """Places it anew, on a node that is there now: for the sake of feeding no node is to be brought."""
        every: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        nodes = {node["NodeID"] for node in every if node["Alive"]} - self._emptied()
        return self._anew(number, {NODE_LABEL: f"in({','.join(sorted(nodes))})"})

    def _anew(self, number: int, nodes: dict[str, str] | None = None) -> Any:
        with suppress(RayError):
            ray.kill(self._handles[number])  # also one that has died: until then its name is taken
        return self._create(number, nodes)

    def _create(self, number: int, nodes: dict[str, str] | None = None) -> Any:
        remote: Any = ray.remote
        actor: Any = remote(concurrency_groups={"watch": 1})(FeedActor)
        while not self._ended.is_set():
            try:
                handle = self._handles[number] = actor.options(
                    name=feed_name(self._run, number),
                    namespace=NAMESPACE,
                    num_cpus=self._cpus,
                    max_restarts=-1,
                    scheduling_strategy="SPREAD",
                    label_selector=nodes,
                ).remote(self._job)
                return handle
            except ValueError:  # that of a controller which died is still on its way out
                self._ended.wait(UNAVAILABLE_SECONDS)
        return None

    def _lost(self, number: int, reason: str) -> float:
        if not self._ended.is_set():
            self._note(FeedWorkerLost(self._step(), number, reason))
        return time.monotonic()


def _why(error: RayError) -> str:
    if isinstance(error, RayTaskError):
        return f"raised {first_line(error)}"
    return "process died" if isinstance(error, RayActorError) else first_line(error)
