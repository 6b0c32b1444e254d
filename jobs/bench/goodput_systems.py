"""The systems that the goodput bench puts through its trace, each on as many places as it has workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

from actors.cluster import RayRun
from jobs.bench.goodput_trace import Step
from jobs.bench.places import NODE_BOOT_SECONDS, Places
from jobs.bench.ray_train_peer import TUNED, RayTrainRun
from jobs.bench.ray_train_peer import Setting as RayTrainSetting
from jobs.bench.resident import started
from jobs.recipe.recipe import Recipe

if TYPE_CHECKING:  # torchft need not be installed
    from jobs.bench.torchft_peer import Replicas


class System(Protocol):
    """What is put through the trace."""

    def steps(self) -> list[Step]:
        """The committed steps so far. Raises RuntimeError if the system has ended."""
        ...

    def together(self) -> int:
        """How many steps all workers have made together."""
        ...

    def take_away(self, place: int) -> float:
        """Kills whatever runs there; returns when, in seconds since 1970."""
        ...

    @property
    def boot_seconds(self) -> float:
        """About how long ``give_back`` takes: so much earlier it is called."""
        ...

    def give_back(self, place: int) -> None:
        """Returns when the place is there: what the newcomer then needs is its system's own affair."""
        ...


class _Reknit:
    boot_seconds = NODE_BOOT_SECONDS

    def __init__(self, run: RayRun, places: Places, workers: int) -> None:
        self._run, self._workers = run, workers
        self.take_away, self.give_back = places.take_away, places.give_back

    def steps(self) -> list[Step]:
        progress = self._run.progress(0, 0)
        if progress.outcome is not None:
            raise RuntimeError(f"the run ended early: {progress.message}")
        return [
            Step(record.step, record.committed_at, record.samples, record.workers)
            for record in progress.steps
        ]

    def together(self) -> int:
        return sum(record.workers == self._workers for record in self._run.progress(0, 0).steps)


@contextmanager
def reknit(recipe: Recipe) -> Iterator[System]:
    """Reknit on a Ray node per place."""
    workers = recipe.parallel.workers
    with TemporaryDirectory(prefix="reknit-bench-") as folder, Places(workers) as places:
        places.connect()
        with started(recipe, Path(folder) / "run") as run:
            yield _Reknit(run, places, workers)


class _RayTrain:
    boot_seconds = NODE_BOOT_SECONDS

    def __init__(self, run: RayTrainRun, places: Places, workers: int) -> None:
        self._run, self._workers = run, workers
        self.take_away, self.give_back = places.take_away, places.give_back

    def steps(self) -> list[Step]:
        self._run.check()
        return self._run.steps()

    def together(self) -> int:
        return len(self.steps()) if len(self._run.workers()) == self._workers else 0


@contextmanager
def ray_train(recipe: Recipe) -> Iterator[System]:
    """Ray Train's elastic trainer on a Ray node per place."""
    workers = recipe.parallel.workers
    setting = RayTrainSetting(recipe.parallel.min_workers, workers, environment=TUNED)
    with (
        TemporaryDirectory(prefix="reknit-ray-train-") as folder,
        Places(workers) as places,
        RayTrainRun(recipe, setting, places.address, Path(folder)) as run,
    ):
        yield _RayTrain(run, places, workers)


class _Torchft:
    boot_seconds = 0.0

    def __init__(self, replicas: Replicas, workers: int) -> None:
        self._replicas = replicas
        self._at_place = list(range(workers))

    def steps(self) -> list[Step]:
        self._replicas.check()
        return self._replicas.steps()

    def together(self) -> int:
        self._replicas.check()
        return sum(commit.losses == 0 for commit in self._replicas.commits())

    def take_away(self, place: int) -> float:
        return self._replicas.kill(self._at_place[place])

    def give_back(self, place: int) -> None:
        self._at_place[place] = self._replicas.add(place)


@contextmanager
def torchft(recipe: Recipe, *, whole_batch: bool) -> Iterator[System]:
    """torchft with a process per place. Its lighthouse is spared, as the others' controllers are."""
    from jobs.bench.torchft_peer import TUNED_TIMEOUTS, Replicas, Setting

    workers = recipe.parallel.workers
    setting = Setting(workers, **TUNED_TIMEOUTS, whole_batch=whole_batch, one_by_one=True)
    with TemporaryDirectory(prefix="reknit-torchft-") as folder:
        replicas = Replicas(recipe, setting, Path(folder))
        try:
            yield _Torchft(replicas, workers)
        finally:
            replicas.close()
