"""``reknit chaos``: trains while workers, nodes and the controller are killed, stopped, slowed down, drained
and added for real, and compares the bits with an undisturbed run's at the end."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from actors.cluster import RayRun, gcs_address
from actors.local_cluster import SLOT, LocalCluster
from jobs.assembly import assemble, run_settings
from jobs.chaos_plan import SHORTEST_GAP, Outcome, Strike, account, schedule
from jobs.chaos_strikes import SLOTS, Striker, watched_processes
from jobs.exits import RunFailed
from jobs.recipe.recipe import Recipe, load_recipe
from jobs.verify import verify
from runtime.run_folder import RunFolder, default_path

LEAST_NODES = 3

MORE = 2
"""Workers that may join beyond the recipe's, where it names no ``max_workers``."""

WITHOUT_END = 1_000_000_000
"""Steps. The run is stopped at a step boundary when its time is over."""

FORMING_SECONDS, STALLED_SECONDS, ENDING_SECONDS = 300.0, 120.0, 120.0
"""How long the first step, a next one, and the end may be waited for."""

POLL_SECONDS = 0.1


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

    It trains on a Ray cluster of its own, of several nodes on this machine. The recipe's number of steps
    does not count: after ``minutes`` the run is stopped at a step boundary, and as many steps are compared
    as it has made (the learning rate follows the recipe's ``decay_steps`` all the same).

    Raises ValueError for a mistake in the recipe or the arguments, RunFailed if the run failed or stood
    still, ConnectionError if its controller is gone for good.
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
    intention = f"{len(strikes)} strikes in {minutes:g} min, seed {seed}; run folder {path}"
    console.print(intention, highlight=False, markup=False, soft_wrap=True)
    with ExitStack() as stack:
        log = stack.enter_context(folder.ray_log.open("a", encoding="utf-8"))
        stack.enter_context(redirect_stdout(log))
        processes = stack.enter_context(watched_processes())
        cluster = stack.enter_context(LocalCluster(nodes, SLOTS, recipe.parallel.cpus_per_worker))
        settings = run_settings(recipe, folder.path)
        folder.note_controller(address=gcs_address(), name=settings.name)
        run = stack.enter_context(RayRun(job, settings))
        striker = Striker(run, cluster, processes, console)
        stack.callback(striker.end)
        stack.enter_context(_at_most(minutes * 60.0 + FORMING_SECONDS + STALLED_SECONDS + ENDING_SECONDS))
        _live_through(run, striker, strikes, minutes * 60.0, console)
    console.print(_table(account(striker.done, folder.read_events().events, folder.read_steps().steps)))
    return verify(folder.path, console)


def for_chaos(recipe: Recipe) -> Recipe:
    """The recipe with room for change: no last step, its own rate of decay, workers on chaos's nodes only.

    Raises ValueError for a recipe that asks for GPUs.
    """
    parallel = recipe.parallel
    if parallel.gpus_per_worker:
        raise ValueError(
            f"parallel.gpus_per_worker is {parallel.gpus_per_worker:g}, but chaos makes several nodes "
            "of this one machine, whose workers share its CPUs only: set it to 0"
        )
    sections = recipe.model_dump()
    sections["run"]["steps"] = WITHOUT_END
    sections["optimizer"]["decay_steps"] = recipe.decay_steps
    sections["parallel"]["max_workers"] = parallel.max_workers or parallel.workers + MORE
    sections["parallel"]["resources"] = {**parallel.resources, SLOT: 1.0}
    return Recipe.model_validate(sections)


def _live_through(
    run: RayRun, striker: Striker, strikes: Sequence[Strike], seconds: float, console: Console
) -> None:
    """Strikes until the time is over, and sees the run to its end."""
    events_seen = steps = 0
    began: float | None = None
    moved, patience = time.monotonic(), FORMING_SECONDS
    waiting = list(strikes)
    stopping, struck = False, 0.0
    while not run.wait(POLL_SECONDS):
        progress = run.progress(1 << 30, events_seen)
        events_seen += len(progress.events)
        for line in progress.lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
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
        # while a controller comes back nobody can be asked: what was due then is not done all at once
        if waiting and now - began >= waiting[0].at and now - struck >= SHORTEST_GAP:
            striker.strike(waiting.pop(0))
            struck = time.monotonic()
        elif now - began >= seconds and not stopping:
            stopping = True
            striker.end()
            run.stop()
    run.finish()
    last = run.progress(1 << 30, events_seen)
    for line in last.lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if not stopping or last.outcome not in ("interrupted", "completed"):
        raise RunFailed(last.message or "it ended before its time")


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises RunFailed in the main thread where the time is over: a controller that never comes back leaves
    every call to it waiting."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise RunFailed(f"it has not ended after {seconds:.0f} s")

    # an alarm, since Ctrl-C may be ignored (a shell's background job), and reaches no call that waits
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


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
