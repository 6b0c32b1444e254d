"""``reknit chaos``: trains while workers, nodes and the controller are killed, stopped, slowed down, drained and
added for real, and compares the bits with an undisturbed run's at the end."""

from __future__ import annotations

import heapq
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.table import Table

from actors.cluster import RayRun, gcs_address
from actors.local_cluster import SLOT, LocalCluster
from jobs.assembly import assemble, run_settings
from jobs.chaos_plan import Done, Outcome, Strike, account, schedule
from jobs.recipe import Recipe, load_recipe
from jobs.train import RunFailed
from jobs.verify import verify
from runtime.plan import WorkerId
from runtime.run_folder import RunFolder, default_path

SLOTS = 2
"""Workers that a node has room for."""

LEAST_NODES = 3

MORE = 2
"""Workers that may join beyond the recipe's, where it names no ``max_workers``."""

WITHOUT_END = 1_000_000_000
"""Steps. The run is stopped at a step boundary when its time is over."""

FORMING_SECONDS, STALLED_SECONDS, ENDING_SECONDS = 300.0, 120.0, 120.0
"""How long the first step, a next one, and the end may be waited for."""

POLL_SECONDS = 0.1
SLOW_SECONDS = 0.02


def chaos(
    recipe: str | Path | Recipe,
    minutes: float,
    seed: int,
    console: Console,
    overrides: Sequence[str] = (),
    *,
    run_folder: str | Path | None = None,
) -> bool:
    """Whether a run of ``recipe`` under ``minutes`` of chaos has the bits of an undisturbed one.

    It trains on a Ray cluster of its own, of several nodes on this machine. The recipe's number of steps does
    not count: after ``minutes`` the run is stopped at a step boundary, and as many steps are compared as it has
    made (the learning rate follows the recipe's ``decay_steps`` all the same).

    Raises ValueError for a mistake in the recipe or the arguments, RunFailed if the run failed or stood still.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    recipe = for_chaos(recipe)
    nodes = max(LEAST_NODES, math.ceil(recipe.parallel.workers / SLOTS))
    strikes = schedule(minutes, seed, nodes)
    path = Path(run_folder) if run_folder is not None else default_path(recipe.run.name + "-chaos")
    root = recipe.checkpoint.folder or str(path / "checkpoints")
    job = assemble(recipe, root)
    folder = RunFolder.create(path, recipe.to_toml(), {"seed": recipe.run.seed, "chaos_seed": seed})
    console.print(
        f"{len(strikes)} strikes in {minutes:g} min, seed {seed}; run folder {path}", highlight=False
    )
    with folder.ray_log.open("a", encoding="utf-8") as log, redirect_stdout(log):
        with (
            LocalCluster(nodes, SLOTS, recipe.parallel.cpus_per_worker) as cluster,
            _processes() as processes,
        ):
            settings = run_settings(recipe, folder.path)
            with RayRun(job, settings, secrets.token_bytes(32)) as run:
                folder.note_controller(address=gcs_address(), name=settings.name)
                striker = _Striker(run, cluster, processes, console)
                try:
                    _live_through(run, striker, strikes, minutes * 60.0, console)
                finally:
                    striker.end()
    console.print(_table(account(striker.done, folder.read_events().events, folder.read_steps().steps)))
    return verify(folder.path, console)


def for_chaos(recipe: Recipe) -> Recipe:
    """The recipe with room for change: no last step, its own rate of decay, workers on chaos's nodes only.

    Raises ValueError for a recipe that asks for GPUs.
    """
    parallel = recipe.parallel
    if parallel.gpus_per_worker:
        raise ValueError(
            f"parallel.gpus_per_worker is {parallel.gpus_per_worker:g}: chaos makes several nodes of this one "
            "machine, whose workers share its CPUs only; set it to 0"
        )
    sections = recipe.model_dump()
    sections["run"]["steps"] = WITHOUT_END
    sections["optimizer"]["decay_steps"] = recipe.decay_steps
    sections["parallel"]["max_workers"] = parallel.max_workers or parallel.workers + MORE
    sections["parallel"]["resources"] = {**parallel.resources, SLOT: 1.0}
    return Recipe.model_validate(sections)


def _live_through(
    run: RayRun, striker: _Striker, strikes: Sequence[Strike], seconds: float, console: Console
) -> None:
    """Strikes until the time is over, and sees the run to its end."""
    events_seen = steps = 0
    began: float | None = None
    moved, patience = time.monotonic(), FORMING_SECONDS
    waiting = list(strikes)
    stopping = False
    while not run.wait(POLL_SECONDS):
        progress = run.progress(1 << 30, events_seen)
        events_seen += len(progress.events)
        for line in progress.lines:
            console.print(line, highlight=False, soft_wrap=True)
        if progress.outcome is not None:
            break
        now = time.monotonic()
        if progress.steps_total != steps:
            steps, moved = progress.steps_total, now
            began = now if began is None else began
            patience = ENDING_SECONDS if stopping else STALLED_SECONDS
        elif now - moved > patience:
            raise RunFailed(f"it made no step for {patience:.0f} s: stuck at step {steps + 1}")
        if began is None:
            continue
        striker.look()
        if waiting and now - began >= waiting[0].at:
            striker.strike(waiting.pop(0))
        elif now - began >= seconds and not stopping:
            stopping = True
            striker.end()
            run.stop()
    run.finish()
    last = run.progress(1 << 30, events_seen)
    for line in last.lines:
        console.print(line, highlight=False, soft_wrap=True)
    if not stopping or last.outcome not in ("interrupted", "completed"):
        raise RunFailed(last.message or "it ended before its time")


@dataclass
class _Striker:
    """Carries strikes out. ``look`` keeps in mind who is there, for when nobody can be asked."""

    run: RayRun
    cluster: LocalCluster
    processes: _Processes
    console: Console
    done: list[Done] = field(default_factory=list)
    _workers: tuple[WorkerId, ...] = ()
    _pids: dict[WorkerId, int] = field(default_factory=dict)
    _domains: dict[WorkerId, str] = field(default_factory=dict)
    _controller: int = 0
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=count)
    _slowing: list[tuple[threading.Event, threading.Thread]] = field(default_factory=list)

    def look(self) -> None:
        """Takes in who is there now, and does what is due of earlier strikes."""
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()
        plan = self.run.plan()
        self._pids, self._domains = dict(self.run.processes()), dict(self.run.domains())
        self._workers = tuple(w for w in plan.workers if w in self._pids) if plan else ()
        self._controller = self.run.controller_process()
        self.processes.note(self._controller, *self._pids.values())

    def strike(self, strike: Strike) -> None:
        """Does it, and keeps account of it."""
        at = time.time()
        what, workers = self._carry_out(strike)
        self.done.append(Done(at, strike.kind, what, workers))
        self.console.print(f">> {what}", highlight=False, soft_wrap=True)

    def _carry_out(self, strike: Strike) -> tuple[str, tuple[WorkerId, ...]]:
        if strike.kind == "join":
            self.cluster.add()
            return f"a node is added, with room for {SLOTS} workers", ()
        if strike.kind == "node":
            nodes = self.cluster.nodes()
            node = nodes[int(strike.pick * len(nodes))]
            victims = tuple(worker for worker in self._workers if self._domains[worker] == node)
            self.cluster.lose(node)
            named = " and ".join(map(str, victims)) or "no worker"
            return f"a node is killed, with {named} on it", victims
        if strike.kind == "controller":
            self.processes.signal(self._controller, signal.SIGKILL)
            return "SIGKILL to the controller", ()
        if not self._workers:
            return f"{strike.kind}: there is nobody at work", ()
        worker = self._workers[int(strike.pick * len(self._workers))]
        return self._at_worker(strike, worker), (worker,)

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


class _Processes:
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
        if process in self._born and _born_at(process) == self._born[process]:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def end(self) -> None:
        """SIGKILL to whoever is left; a process that is stopped does not notice the end of its node."""
        for process in self._born:
            self.signal(process, signal.SIGKILL)


@contextmanager
def _processes() -> Iterator[_Processes]:
    processes = _Processes()
    try:
        yield processes
    finally:
        processes.end()


def _born_at(process: int) -> str | None:
    """When a process was started, in clock ticks since boot (proc(5)); None if there is none."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()[19]


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="What was done, and what the run made of it")
    table.add_column("at", justify="right")
    table.add_column("what was done")
    table.add_column("what became of it")
    table.add_column("longest time without a commit", justify="right")
    for outcome in outcomes:
        at = outcome.done.time - outcomes[0].done.time
        table.add_row(f"{at:.0f} s", outcome.done.what, outcome.made, f"{outcome.standstill:.2f} s")
    return table
