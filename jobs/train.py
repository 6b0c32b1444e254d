"""``reknit train``: starts a run on Ray, shows it, and returns what came of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree

from rich.console import Console

from actors.cluster import RayRun, connect, gcs_address
from jobs.assembly import assemble, run_settings, targets_folder_of
from jobs.control import found
from jobs.display import Display
from jobs.exits import RunFailed
from jobs.interruption import interruptible
from jobs.recipe.recipe import Recipe, load_recipe
from jobs.resuming import refuse_another_recipe
from jobs.showing import Showing
from jobs.terminal import plain_console
from runtime.checkpoint import list_checkpoints
from runtime.events import Event, StepRecord
from runtime.run_folder import RunFolder, default_path
from runtime.settings import ray_address
from runtime.targets import withdraw

POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came of a run. ``steps`` are this start's, ascending; ``badput`` is in seconds by cause.

    ``outcome`` is "completed", or "interrupted" for a run that was stopped at a step boundary and can be
    resumed.
    """

    run_folder: Path
    outcome: str
    steps: tuple[StepRecord, ...]
    events: tuple[Event, ...]
    goodput: float
    badput: Mapping[str, float]

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(record.loss for record in self.steps)


def train(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    resume: bool = False,
    run_folder: str | Path | None = None,
    detach: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Trains ``recipe`` and returns when the run has ended.

    ``overrides`` are like ``parallel.workers=6``. ``address`` joins an existing Ray cluster; without
    it a Ray that is already connected is used, else a local one is started and stopped again. ``resume``
    goes on from the newest whole checkpoint of ``run_folder`` (default: the recipe's newest run).
    ``detach``: the run goes on if this process dies, and ``attach`` shows it again.
    Ctrl-C ends the run at the next step boundary with a checkpoint. Without a ``console`` of the caller's
    the run is shown on standard output, and what Ray itself prints goes to ``ray.log`` in the run folder.

    Raises ValueError for a mistake in the recipe or the arguments, RunFailed if the run failed,
    ConnectionError if its controller is gone for good. A run that could not even be started leaves no folder.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise ValueError("overrides apply to a recipe's file: pass its path, or an already changed Recipe")
    path = _run_path(recipe, run_folder, resume)
    root = recipe.checkpoint.folder or str(path / "checkpoints")
    if not resume and list_checkpoints(root):
        raise ValueError(
            f"{root} holds the checkpoints of another run: name another checkpoint.folder, or go on with "
            "that run by --resume"
        )
    if resume:
        refuse_another_recipe(recipe, RunFolder(path))
    if detach and (address or ray_address()) is None:
        raise ValueError(
            "a detached run needs a Ray cluster that outlives this command: start one (`ray start --head`) "
            "and name it by --address"
        )
    job = assemble(recipe, root)
    parallel = recipe.parallel
    with ExitStack() as stack:
        before = _entries(path)
        folder = RunFolder.create(path, recipe.to_toml(), _facts(recipe), resume=resume)
        unless_started = stack.enter_context(ExitStack())
        if not resume:
            unless_started.callback(_remove_what_is_new, path, before)
        settings = run_settings(recipe, folder.path, resume=resume)
        if console is None:
            console = plain_console()
            log = stack.enter_context(folder.ray_log.open("a", encoding="utf-8"))
            stack.enter_context(redirect_stdout(log))
        stack.enter_context(
            connect(
                address,
                parallel.workers,
                parallel.cpus_per_worker,
                parallel.gpus_per_worker,
                more_cpus=recipe.data.feed_workers * recipe.data.feed_cpus,
            )
        )
        # before the controller begins to add to it
        folder.note_controller(address=gcs_address(), name=settings.name)
        if not detach:  # the controller does so itself, unless it is ended at once
            stack.callback(withdraw, targets_folder_of(recipe), "train", folder.name)
        run = stack.enter_context(RayRun(job, settings, detached=detach))
        port = run.metrics_port()
        unless_started.pop_all()
        console.print(f"run folder {folder.path}", highlight=False, soft_wrap=True)
        if port is not None:
            console.print(f"metrics at port {port}, /metrics", highlight=False, soft_wrap=True)
        return _see_through(run, folder.path, console)


def attach(run_folder: str | Path, *, console: Console | None = None) -> TrainResult:
    """Shows a detached run that is under way, from its first step on, until it has ended.

    Ctrl-C lets go of it: the run goes on. Raises ValueError if it is not under way, RunFailed if it failed,
    ConnectionError if its controller is gone for good.
    """
    folder = RunFolder(run_folder)
    with ExitStack() as stack:
        run = stack.enter_context(found(folder))
        return _see_through(run, folder.path, console or plain_console(), stops=False)


def _see_through(run: RayRun, path: Path, console: Console, *, stops: bool = True) -> TrainResult:
    """Shows the run to its end. ``stops``: Ctrl-C stops it, else it only ends the show."""
    showing = Showing(load_recipe(RunFolder(path).recipe), path)
    with interruptible(partial(_stop, run, console)) if stops else nullcontext():
        steps, events = _follow(run, Display(console, time.monotonic), showing)
    final = run.progress(0, 0)
    result = TrainResult(
        run_folder=path,
        outcome=final.outcome or "failed",
        steps=steps,
        events=events,
        goodput=final.goodput,
        badput=run.badput(),
    )
    run.end()
    if result.outcome == "failed":
        raise RunFailed(final.message)
    return result


def _follow(
    run: RayRun, display: Display, showing: Showing
) -> tuple[tuple[StepRecord, ...], tuple[Event, ...]]:
    steps_seen = events_seen = 0
    with display:
        while True:
            ended = run.wait(POLL_SECONDS)
            progress = run.progress(steps_seen, events_seen)
            steps_seen, events_seen = progress.steps_total, events_seen + len(progress.events)
            display.show(progress)
            over = ended or progress.outcome is not None
            display.say(showing.look(progress.events, last=over))
            if over:
                run.finish()
                whole = run.progress(0, 0)
                return whole.steps, whole.events


def _run_path(recipe: Recipe, run_folder: str | Path | None, resume: bool) -> Path:
    if run_folder is not None:
        return Path(run_folder).expanduser().absolute()
    if not resume:
        return default_path(recipe.run.name).absolute()
    earlier = sorted(
        (path.parent for path in Path("runs").glob(f"{recipe.run.name}-*/run.json")),
        key=lambda path: (path / "run.json").stat().st_mtime,
    )
    if not earlier:
        raise ValueError(
            f"there is no run of {recipe.run.name} in {Path('runs').absolute()} to resume: name its folder "
            "by --run-folder, or start without --resume"
        )
    return earlier[-1].absolute()


def _entries(path: Path) -> frozenset[Path] | None:
    """What is in a folder; None where there is no folder."""
    return frozenset(path.iterdir()) if path.exists() else None


def _remove_what_is_new(path: Path, before: frozenset[Path] | None) -> None:
    """Makes a folder what it was, so that a later --resume does not take it for the newest run."""
    for entry in (_entries(path) or frozenset()) - (before or frozenset()):
        if entry.is_dir():
            rmtree(entry)
        else:
            entry.unlink()
    if before is None and path.exists():
        path.rmdir()


def _facts(recipe: Recipe) -> dict[str, object]:
    return {
        "seed": recipe.run.seed,
        "numerics": recipe.numerics_digest(),
        "threads": recipe.parallel.threads,
        "device": "cuda" if recipe.parallel.gpus_per_worker else "cpu",
        "started": time.time(),
        "versions": {
            "reknit": version("reknit"),
            "torch": version("torch"),
            "ray": version("ray"),
            "python": sys.version.split()[0],
        },
    }


def _stop(run: RayRun, console: Console) -> None:
    console.print(
        "stopping at the next step boundary, with a checkpoint; once more to stop at once", highlight=False
    )
    run.stop()


if __name__ == "__main__":
    from jobs.cli import train_alone

    train_alone()
