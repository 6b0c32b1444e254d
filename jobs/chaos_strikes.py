"""Carries out what a chaos plan wants: real signals to real processes, and nodes that really end."""

from __future__ import annotations

import heapq
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from rich.console import Console

from actors.cluster import RayRun
from actors.local_cluster import LocalCluster
from jobs.chaos_plan import Done, Strike
from runtime.plan import WorkerId

SLOTS = 2
"""Workers that a node has room for."""

SLOW_SECONDS = 0.02
"""A slow process is stopped this long, and goes on this long."""


@dataclass
class Striker:
    """Carries strikes out. ``look`` keeps in mind who is there, for when nobody can be asked."""

    run: RayRun
    cluster: LocalCluster
    processes: Processes
    console: Console
    done: list[Done] = field(default_factory=list)
    _workers: tuple[WorkerId, ...] = ()
    _pids: dict[WorkerId, int] = field(default_factory=dict)
    _domains: dict[WorkerId, str] = field(default_factory=dict)
    _controller: int = 0
    _controller_node: str = ""
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=count)
    _slowing: list[tuple[threading.Event, threading.Thread]] = field(default_factory=list)

    def look(self) -> None:
        """Takes in who is there now, and does what is due of earlier strikes."""
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()
        plan = self.run.plan()
        self._pids.update(self.run.processes())
        self._domains.update(self.run.domains())
        if plan is not None:  # a controller that takes over has none yet
            self._workers = tuple(worker for worker in plan.workers if worker in self._pids)
        self._controller = self.run.controller_process()
        self._controller_node = self.run.controller_node()
        self.processes.note(self._controller, *self._pids.values())

    def strike(self, strike: Strike) -> None:
        """Does it, and keeps account of it."""
        self.done.append(self._carry_out(strike, time.time()))
        self.console.print(f">> {self.done[-1].what}", highlight=False, soft_wrap=True)

    def _carry_out(self, strike: Strike, now: float) -> Done:
        if strike.kind == "join":
            self.cluster.add()
            return Done(now, f"a node is added, with room for {SLOTS} workers")
        if strike.kind == "node":
            return self._lose_node(strike, now)
        if strike.kind == "controller":
            self.processes.signal(self._controller, signal.SIGKILL)
            return Done(now, "SIGKILL to the controller", controller=True)
        workers = [worker for worker in self._workers if self.processes.live(self._pids[worker])]
        if not workers:
            return Done(now, f"{strike.kind}: there is nobody at work")
        worker = workers[int(strike.pick * len(workers))]
        return Done(now, self._at_worker(strike, worker), (worker,), strike.kind == "both")

    def _lose_node(self, strike: Strike, now: float) -> Done:
        nodes = self.cluster.nodes()
        node = nodes[int(strike.pick * len(nodes))]
        victims = tuple(worker for worker in self._workers if self._domains[worker] == node)
        # a controller that was started anew may be anywhere
        controller = self._controller_node == node
        self.cluster.lose(node)
        named = [f"worker {worker}" for worker in victims] + ["the controller"] * controller
        return Done(
            now, f"a node is killed, with {' and '.join(named) or 'nobody'} on it", victims, controller
        )

    def _at_worker(self, strike: Strike, worker: WorkerId) -> str:
        process = self._pids[worker]
        match strike.kind:
            case "kill":
                self.processes.signal(process, signal.SIGKILL)
                return f"SIGKILL to worker {worker}"
            case "term":
                self.processes.signal(process, signal.SIGTERM)
                return f"SIGTERM to worker {worker}"
            case "both":
                self.processes.signal(self._controller, signal.SIGKILL)
                self.processes.signal(process, signal.SIGKILL)
                return f"SIGKILL to the controller and to worker {worker}"
            case "drain":
                known = self.run.drain(worker, "chaos", 30.0)
                return f"worker {worker} is drained" + ("" if known else " (it had gone already)")
            case "stop":
                self.processes.signal(process, signal.SIGSTOP)
                self._later(strike.seconds, lambda: self.processes.signal(process, signal.SIGCONT))
                return f"SIGSTOP to worker {worker}, SIGCONT after {strike.seconds:.1f} s"
            case _:
                self._slow_down(process, strike.seconds)
                return f"worker {worker} at half speed for {strike.seconds:.1f} s"

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), action))

    def _slow_down(self, process: int, seconds: float) -> None:
        enough = threading.Event()
        until = time.monotonic() + seconds

        def slow() -> None:
            while time.monotonic() < until and not enough.is_set():
                self.processes.signal(process, signal.SIGSTOP)
                enough.wait(SLOW_SECONDS)
                self.processes.signal(process, signal.SIGCONT)
                enough.wait(SLOW_SECONDS)

        thread = threading.Thread(target=slow, daemon=True)
        thread.start()
        self._slowing.append((enough, thread))

    def end(self) -> None:
        """Nobody stays stopped or slow."""
        for enough, thread in self._slowing:
            enough.set()
            thread.join()
        while self._due:
            heapq.heappop(self._due)[2]()


class Processes:
    """Those of the run, by id and start time: ids are used again."""

    def __init__(self) -> None:
        self._born: dict[int, str] = {}

    def note(self, *processes: int) -> None:
        for process in processes:
            born = _born_at(process)
            if process not in self._born and born is not None:
                self._born[process] = born

    def signal(self, process: int, number: signal.Signals) -> None:
        """Does nothing if the process is not there any more."""
        if self.live(process):
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def live(self, process: int) -> bool:
        """Whether it is still there."""
        return process in self._born and _born_at(process) == self._born[process]

    def end(self) -> None:
        """SIGKILL to whoever is left; a process that is stopped does not notice the end of its node."""
        for process in self._born:
            self.signal(process, signal.SIGKILL)


@contextmanager
def watched_processes() -> Iterator[Processes]:
    processes = Processes()
    try:
        yield processes
    finally:
        processes.end()


def _born_at(process: int) -> str | None:
    """When a process was started, in clock ticks since boot (proc(5)); None if it has ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
