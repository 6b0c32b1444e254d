"""The recovery bench's other rows: a worker that hangs, a node that is lost, a controller that is lost.

Hang: SIGSTOP, so that every connection stays open. Node: SIGKILL to a Ray node's raylet and all that runs on
it. Controller: SIGKILL to the process that leads the run; what counts is the longest time without a commit
from then on. Seconds are as in ``kills``: less an undisturbed step.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.console import Console

from jobs.bench.kills import Commit, Recovery, recovery, summary
from jobs.bench.places import Places
from jobs.bench.ray_train_peer import TUNED, RayTrainRun
from jobs.bench.ray_train_peer import Setting as RayTrainSetting
from jobs.bench.resident import started
from jobs.bench.struck import CALM_STEPS, PATIENCE_SECONDS, POLL_SECONDS, START_SECONDS, Watched, stopped
from jobs.bench.witness import commits_seen, witnessed
from jobs.recipe.recipe import Recipe
from runtime.events import StepRecord
from runtime.plan import Plan, WorkerId
from runtime.run_folder import RunFolder

if TYPE_CHECKING:  # torchft need not be installed
    from jobs.bench.torchft_peer import Replicas

HANGS, NODES, LIGHTHOUSES = 3, 3, 2
WATCH_SECONDS = 10.0
"""How long commits are watched after a controller's loss."""

RAY_TRAIN_CHECKPOINT_EVERY = 10


@dataclass(frozen=True, slots=True)
class FaultRow:
    """One row. ``batch_after`` None: nobody went on. ``note`` says what the figures do not."""

    what: str
    recoveries: tuple[Recovery, ...]
    batch_after: int | None
    note: str | None = None

    def cells(self) -> dict[str, str | float | int | None]:
        """In the columns of ``kills.summary``."""
        return {**summary(self.what, self.recoveries, 0), "batch_after": self.batch_after}


def pause(commits: Sequence[Commit], at: float, until: float) -> Recovery:
    """The longest time without a commit between ``at`` and ``until``, in which nobody need have been lost.

    It counts from ``at`` or from a later commit, less an undisturbed step: the median of those before ``at``.
    Raises ValueError if fewer than two commits came before ``at``.
    """
    times = sorted(commit.at for commit in commits)
    before = [time for time in times if time <= at]
    if len(before) < 2:
        raise ValueError("the fault came before two steps were committed: wait longer")
    step_seconds = median(later - earlier for earlier, later in pairwise(before))
    moments = [at, *(time for time in times if at < time < until), until]
    longest = max(later - earlier for earlier, later in pairwise(moments))
    return Recovery(longest - step_seconds, longest - step_seconds, step_seconds)


def torchft_rows(recipe: Recipe, random_: random.Random, console: Console) -> list[FaultRow]:
    """torchft's replica that hangs and its lighthouse that is lost. A replica is its own node."""
    from jobs.bench.torchft_peer import Replicas, Setting

    @contextmanager
    def trained(setting: Setting) -> Iterator[Replicas]:
        with TemporaryDirectory(prefix="reknit-torchft-") as folder:
            replicas = Replicas(recipe, setting, Path(folder))
            try:
                calm = replicas.wait(
                    lambda commits: sum(commit.losses == 0 for commit in commits) >= CALM_STEPS, START_SECONDS
                )
                if not calm:
                    raise RuntimeError(f"torchft's replicas did not train together in {START_SECONDS:.0f} s")
                time.sleep(random_.uniform(0.0, 0.5))
                yield replicas
            finally:
                replicas.close()

    full = recipe.parallel.micro_batches * recipe.parallel.micro_batch_size
    hangs: list[Recovery] = []
    impatient = Setting(3, join_timeout_ms=100, timeout_seconds=1.0)
    for number in range(HANGS):
        console.print(f"torchft: replica hangs, {number + 1} of {HANGS}", highlight=False)
        with trained(impatient) as replicas:
            at = replicas.kill(random_.randrange(3), signal.SIGSTOP)
            replicas.wait(lambda commits: commits[-1].losses > 0, PATIENCE_SECONDS)
            found = recovery(replicas.commits(), at)
        if found is not None:
            hangs.append(found)
    pauses = []
    ends = []
    retrying = Setting(3, join_timeout_ms=2000, quorum_timeout_seconds=10.0, quorum_retries=10)
    for number in range(LIGHTHOUSES):
        console.print(f"torchft: lighthouse lost, {number + 1} of {LIGHTHOUSES}", highlight=False)
        with trained(retrying) as replicas:
            try:
                found = _without_lighthouse(replicas)
            except RuntimeError as error:
                ends.append(str(error))
            else:
                pauses += [found] if found else []
    note = (
        "torchft's lighthouse: a new one takes its address at once, join_timeout is set to 2 s, "
        "quorum_timeout to 10 s and quorum_retries to 10; with torchft's defaults all replicas end after 60 s"
    )
    if ends:
        note += f"; {len(ends)} of {LIGHTHOUSES} times training ended: {ends[0]}"
    return [
        FaultRow(
            "torchft x3, hang",
            tuple(hangs),
            full * 2 // 3,
            "torchft's hang: timeout set to 1 s; its default of 60 s is how long survivors would wait",
        ),
        FaultRow(
            "torchft x3, lighthouse lost",
            tuple(pauses),
            full if pauses else None,
            note,
        ),
    ]


def _without_lighthouse(replicas: Replicas) -> Recovery | None:
    """None if nobody went on. Raises RuntimeError if a replica ended by itself."""
    at = replicas.replace_lighthouse()
    if not replicas.wait(lambda commits: commits[-1].at > at + WATCH_SECONDS, PATIENCE_SECONDS):
        return None
    commits = replicas.commits()
    return pause(commits, at, commits[-1].at)


def reknit_rows(recipe: Recipe, random_: random.Random, console: Console) -> list[FaultRow]:
    """Reknit's workers that hang, its lost nodes and its lost controller, in one run that replaces them."""
    workers = recipe.parallel.workers
    replacing = recipe.parallel.model_copy(update={"max_workers": workers})
    recipe = recipe.model_copy(update={"parallel": replacing})
    full = recipe.parallel.micro_batches * recipe.parallel.micro_batch_size
    hangs, nodes = [], []
    with TemporaryDirectory(prefix="reknit-bench-") as folder, Places(workers) as places:
        places.connect()
        path, marks = Path(folder) / "run", Path(folder) / "marks"
        marks.mkdir()
        with started(witnessed(recipe, marks), path) as run:
            record = RunFolder(path)

            def records() -> tuple[StepRecord, ...]:
                return record.read_steps().steps

            def commits() -> list[Commit]:
                return [Commit(record.committed_at, record.generation) for record in records()]

            def check() -> None:
                if run.wait(0.0):
                    raise RuntimeError("the run ended")

            def whole_again() -> bool:
                newest = records()[-1:]
                return bool(newest) and newest[0].workers == workers

            watched = Watched(commits, check)

            def ready() -> None:
                """At a random moment at which all workers train; a plan made meanwhile begins it anew."""
                while True:
                    watched.wait("the lost workers were not replaced", whole_again, START_SECONDS)
                    watched.calm()
                    time.sleep(random_.uniform(0.0, 0.5))
                    if whole_again() and watched.is_calm():
                        return

            for number in range(HANGS):
                console.print(f"reknit: worker hangs, {number + 1} of {HANGS}", highlight=False)
                ready()
                victim = random_.choice(sorted(members(run.plan())))
                with stopped(run.processes()[victim]) as at:
                    hangs.append(watched.recovery(at))
            for number in range(NODES):
                console.print(f"reknit: node lost, {number + 1} of {NODES}", highlight=False)
                ready()
                place = random_.randrange(workers)
                at = places.take_away(place)
                nodes.append(watched.recovery(at))
                places.give_back(place)
            console.print("reknit: controller lost", highlight=False)
            ready()
            controller = run.controller_process()
            at = time.time()
            os.kill(controller, signal.SIGKILL)
            time.sleep(WATCH_SECONDS)
            gone = pause(commits_seen(marks), at, at + WATCH_SECONDS)
    return [
        FaultRow("reknit, hang", tuple(each for each in hangs if each), full),
        FaultRow("reknit, node lost", tuple(each for each in nodes if each), full),
        FaultRow(
            "reknit, controller lost",
            (gone,),
            full,
            f"controller or lighthouse lost: the longest time without a commit in the {WATCH_SECONDS:.0f} s "
            "after it, less an undisturbed step",
        ),
    ]


def members(plan: Plan | None) -> set[WorkerId]:
    """Who takes part in the plan."""
    assert plan is not None, "a run that has committed steps has a plan"
    return {worker for stage in plan.stages for worker in stage.workers}


def ray_train_rows(recipe: Recipe, random_: random.Random, console: Console) -> list[FaultRow]:
    """Ray Train's worker that hangs, its lost node and its lost controller, in one run."""
    workers = recipe.parallel.workers
    full = recipe.parallel.micro_batches * recipe.parallel.micro_batch_size
    setting = RayTrainSetting(
        recipe.parallel.min_workers,
        workers,
        checkpoint_every=RAY_TRAIN_CHECKPOINT_EVERY,
        environment=TUNED,
    )
    with (
        TemporaryDirectory(prefix="reknit-ray-train-") as folder,
        Places(workers) as places,
        RayTrainRun(recipe, setting, places.address, Path(folder)) as run,
    ):
        watched = Watched(run.commits, run.check)
        console.print("Ray Train: worker hangs", highlight=False)
        watched.calm()
        with stopped(random_.choice(run.workers())) as at:
            hang = watched.recovery(at)
        console.print("Ray Train: node lost", highlight=False)
        watched.calm()
        at = places.take_away(random_.randrange(workers))
        node = watched.recovery(at)
        console.print("Ray Train: controller lost", highlight=False)
        watched.calm()
        controller = places.actor_on_head("TrainController")
        assert controller is not None, "Ray Train puts its controller beside its driver"
        at = time.time()
        os.kill(controller, signal.SIGKILL)
        ended = _ends(run)
    return [
        FaultRow(
            "Ray Train, hang",
            (hang,) if hang else (),
            full if hang else None,
            f"Ray Train: a checkpoint every {RAY_TRAIN_CHECKPOINT_EVERY} steps, steps done again are part of "
            f"its seconds; tuned: {', '.join(f'{name}={value}' for name, value in TUNED.items())}",
        ),
        FaultRow("Ray Train, node lost", (node,) if node else (), full if node else None),
        FaultRow(
            "Ray Train, controller lost",
            (),
            None,
            "Ray Train has no such case: its controller is not started again, "
            + ("and the run ended" if ended else f"and the run had not ended {WATCH_SECONDS:.0f} s later"),
        ),
    ]


def _ends(run: RayTrainRun) -> bool:
    """Whether the driver ends by itself soon."""
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        try:
            run.check()
        except RuntimeError:
            return True
        time.sleep(POLL_SECONDS)
    return False
