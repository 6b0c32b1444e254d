"""``reknit bench recovery``: workers are killed at random moments; how long until the next full-batch step?

A kill is a SIGKILL from outside. Its cost is the time from just before the signal to the first step that was
committed by the survivors under their new plan, less an undisturbed step of the same run. The killed
worker's micro-batches are computed by the others, so that step has the full batch. With torchft
installed, the same model, data and schedule of kills are given to it. Further rows are other faults
(``faults``): a worker that hangs, a lost node, a lost controller; there Ray Train takes part too.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from ray.exceptions import RayError
from rich.console import Console

from actors.cluster import RayRun, connect
from actors.recorder import RunProgress
from jobs.bench import faults
from jobs.bench.faults import FaultRow
from jobs.bench.kills import PATIENCE_SECONDS, Commit, Recovery, phase_row, recovery, summary
from jobs.bench.report import BenchReport
from jobs.bench.resident import started
from jobs.recipe.recipe import Recipe
from runtime.events import Recovered, StepRecord, WorkerLost
from runtime.run_folder import RunFolder

GOAL_SECONDS, FEWEST_KILLS = 0.15, 10
RUNS, KILLS_PER_RUN = 6, 2
TORCHFT_SETTINGS = ((3, 60_000, 3), (3, 100, 5), (3, 50, 5))
"""(replicas, join timeout in ms, kills). The first is the default. Of three replicas every survivor is
a neighbour of the dead one in gloo's ring, so that all see the loss at once, and two are a majority;
with shorter timeouts the lighthouse may never see all replicas at once."""

STEPS_BETWEEN_KILLS = 30
LONGEST_WAIT_SECONDS = 60.0
_POLL_SECONDS = 0.25

RECIPE = Recipe.model_validate(
    {
        "run": {"name": "bench-recovery", "steps": 1_000_000, "seed": 1},
        "model": {
            "build": "jobs.models.gpt:build",
            "arguments": {"width": 64, "depth": 2, "heads": 2, "context": 32, "dropout": 0.1, "tied": True},
        },
        "data": {"arguments": {"source": "python-stdlib", "context": 32}},
        "optimizer": {"learning_rate": 1e-3, "clip_norm": 1.0},
        "parallel": {
            "workers": 4,
            "min_workers": 2,
            "stages": 2,
            "micro_batches": 12,
            "micro_batch_size": 2,
        },
        "metrics": {"enabled": False},
    }
)


@dataclass
class Measurement:
    """``phases`` maps a phase to its seconds, one for each kill."""

    recoveries: list[Recovery] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    fingerprints: list[dict[int, int]] = field(default_factory=list)
    """Of each run: those of the parameters after each step."""

    def add_phases(self, seconds: dict[str, float]) -> None:
        for name, value in seconds.items():
            self.phases.setdefault(name, []).append(value)


def run(console: Console) -> BenchReport:
    """Measures; a few minutes."""
    random_ = random.Random(RECIPE.run.seed)
    mine = measure(RECIPE, RUNS, KILLS_PER_RUN, random_, console)
    peers = measure_torchft(RECIPE, random_, console)
    return report(mine, peers, measure_faults(RECIPE, random_, console))


def measure(recipe: Recipe, runs: int, kills: int, random_: random.Random, console: Console) -> Measurement:
    """Kills ``kills`` workers, one after the other, in each of ``runs`` runs on one Ray.

    Raises RuntimeError if a run does not go on after a kill.
    """
    measurement = Measurement()
    parallel = recipe.parallel
    with (
        TemporaryDirectory(prefix="reknit-bench-") as folder,
        connect(None, parallel.workers, parallel.cpus_per_worker, parallel.gpus_per_worker),
    ):
        for number in range(runs):
            console.print(f"reknit: run {number + 1} of {runs}", highlight=False)
            _measure_run(recipe, Path(folder) / str(number), kills, random_, measurement)
    return measurement


def _measure_run(
    recipe: Recipe, path: Path, kills: int, random_: random.Random, measurement: Measurement
) -> None:
    killed_at: list[float] = []
    with started(recipe, path) as ray_run:
        for victim in random_.sample(range(recipe.parallel.workers), kills):
            _wait(ray_run, lost=len(killed_at))
            time.sleep(random_.uniform(0.0, 0.5))
            process = ray_run.processes()[victim]
            killed_at.append(time.time())
            os.kill(process, signal.SIGKILL)
            # whoever asks for progress at once would take the cores from the recovery
            time.sleep(2 * _POLL_SECONDS)
        _wait(ray_run, lost=kills)
        ray_run.stop()
        ray_run.wait(LONGEST_WAIT_SECONDS)
    folder = RunFolder(path)
    _take(folder.read_steps().steps, folder, killed_at, measurement)


def _wait(ray_run: RayRun, lost: int) -> None:
    """Until enough steps were committed by the membership that ``lost`` kills have left."""
    workers = RECIPE.parallel.workers - lost
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    steps: list[StepRecord] = []
    while True:
        progress: RunProgress = ray_run.progress(len(steps), 0)
        steps.extend(progress.steps)
        if sum(record.workers == workers for record in steps) >= STEPS_BETWEEN_KILLS:
            return
        if progress.outcome is not None:
            raise RuntimeError(f"the run ended before all kills were done: {progress.message}")
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"the run committed too few steps in {LONGEST_WAIT_SECONDS:.0f} s; its last line: "
                f"{progress.lines[-1] if progress.lines else 'none'}"
            )
        time.sleep(_POLL_SECONDS)


def _take(
    steps: Sequence[StepRecord], folder: RunFolder, killed_at: Sequence[float], measurement: Measurement
) -> None:
    commits = [Commit(record.committed_at, record.generation) for record in steps]
    batch = RECIPE.parallel.micro_batches * RECIPE.parallel.micro_batch_size
    assert all(record.samples == batch for record in steps), "the batch never shrinks"
    measurement.fingerprints.append({record.step: record.fingerprint for record in steps})
    events = folder.read_events().events
    for at in killed_at:
        result = recovery(commits, at)
        assert result is not None, "steps of the new membership were waited for"
        measurement.recoveries.append(result)
        lost = next(e for e in events if isinstance(e.event, WorkerLost) and e.time > at)
        recovered = next(e for e in events if isinstance(e.event, Recovered) and e.time > at)
        assert isinstance(recovered.event, Recovered)
        seconds = recovered.event.seconds
        committed = at + result.seconds + result.undisturbed_seconds
        measurement.add_phases(
            {
                "detect": lost.time - at,
                "agree": seconds.agree,
                "plan": seconds.plan,
                "move": seconds.move,
                "next step": committed - recovered.time,
            }
        )


@dataclass(frozen=True, slots=True)
class PeerMeasurement:
    """One setting of torchft. None stands for a kill that it did not recover from; ``problem`` says why
    it was not measured any further."""

    name: str
    replicas: int
    recoveries: tuple[Recovery | None, ...]
    problem: str | None = None


def measure_torchft(recipe: Recipe, random_: random.Random, console: Console) -> list[PeerMeasurement]:
    """torchft at its default and at its best join timeout; empty if it is not installed."""
    if find_spec("torchft") is None:
        return []
    from jobs.bench import torchft_peer

    measured = []
    for replicas, join_ms, kills in TORCHFT_SETTINGS:
        name = f"torchft x{replicas}, join {join_ms / 1000:g} s"
        console.print(f"{name}: {kills} kills", highlight=False)
        setting = torchft_peer.Setting(replicas, join_ms)
        recoveries: list[Recovery | None] = []
        problem = None
        try:
            for each in torchft_peer.measure(recipe, setting, kills, random_):
                recoveries.append(each)
        except RuntimeError as error:
            problem = str(error)
        measured.append(PeerMeasurement(name, replicas, tuple(recoveries), problem))
    return measured


def measure_faults(recipe: Recipe, random_: random.Random, console: Console) -> list[FaultRow]:
    """The other faults, for each system that is installed. One that fails is reported, not raised."""
    systems = {"reknit": faults.reknit_rows}
    if find_spec("torchft") is not None:
        systems["torchft"] = faults.torchft_rows
    if find_spec("pandas") is not None:  # without it, Ray Train cannot be imported
        systems["Ray Train"] = faults.ray_train_rows
    rows = []
    for name, measure_rows in systems.items():
        try:
            rows += measure_rows(recipe, random_, console)
        except (RuntimeError, TimeoutError, ConnectionError, RayError) as error:
            rows.append(FaultRow(f"{name}, other faults", (), None, f"{name}: given up: {error}"))
    return rows


def report(
    mine: Measurement, peers: Sequence[PeerMeasurement], other_faults: Sequence[FaultRow] = ()
) -> BenchReport:
    """The table and the headline. Pure."""
    full = RECIPE.parallel.micro_batches * RECIPE.parallel.micro_batch_size
    rows = [summary("reknit", mine.recoveries, full)]
    rows += [phase_row(f"  {name}", seconds) for name, seconds in mine.phases.items()]
    notes = [
        "seconds count from the SIGKILL to the first step committed under the new membership, less an "
        "undisturbed step; detect counts from the kill, next step is the whole step that follows the move",
        f"{same_bits(mine.fingerprints)} steps that several runs made, with other workers killed at other "
        "moments, left the same parameters bit for bit",
        "counting also steps that survivors had all but finished when the kill came, the median is "
        f"{median(each.any_commit_seconds for each in mine.recoveries):.4g} s",
    ]
    if peers:
        notes.append("torchft's batch is smaller after a kill; its join timeout is 60 s by default")
    medians = []
    for peer in peers:
        recovered = [each for each in peer.recoveries if each is not None]
        rows.append(summary(peer.name, recovered, full * (peer.replicas - 1) // peer.replicas))
        if recovered:
            medians.append(median(each.seconds for each in recovered))
        if peer.problem is not None:
            notes.append(f"{peer.name}: given up after {len(peer.recoveries)} kills: {peer.problem}")
        if len(recovered) < len(peer.recoveries):
            stuck = len(peer.recoveries) - len(recovered)
            notes.append(
                f"{peer.name}: no step within {PATIENCE_SECONDS:.0f} s of {stuck} more kills, not in its row"
            )
    if not peers:
        notes.append(
            "torchft is not installed, so there is nothing to compare with: pip install torchft==0.2.0"
        )
    for row in other_faults:
        rows.append(row.cells())
        if row.note is not None:
            notes.append(row.note)
    middle = median(each.seconds for each in mine.recoveries)
    best = min(medians, default=None)
    return BenchReport(
        bench="recovery",
        headline={
            "median_seconds": middle,
            "worst_seconds": max(each.seconds for each in mine.recoveries),
            "torchft_best_median_seconds": best,
        },
        goal=f"median at most {GOAL_SECONDS} s and below torchft's best, over at least {FEWEST_KILLS} kills",
        met=len(mine.recoveries) >= FEWEST_KILLS
        and middle <= GOAL_SECONDS
        and best is not None
        and middle < best,
        rows=tuple(rows),
        notes=tuple(notes),
    )


def same_bits(runs: Sequence[dict[int, int]]) -> int:
    """How many steps more than one run made. Asserts that they left the same fingerprint."""
    by_step: dict[int, list[int]] = {}
    for fingerprints in runs:
        for step, fingerprint in fingerprints.items():
            by_step.setdefault(step, []).append(fingerprint)
    for step, found in by_step.items():
        assert len(set(found)) == 1, f"after step {step} runs differ in their parameters"
    return sum(len(found) > 1 for found in by_step.values())
