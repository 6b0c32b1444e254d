"""What fault tolerance costs while nothing fails: throughput beside a peer that has none, and memory.

Reknit (exact and fast sums) and ``pipelining_peer`` train the same GPT in the same layout, resident on
the same machine at the same time, and take turns of a few steps; whoever is not at turn is stopped by a
signal. So whatever else the machine does meets all of them alike, and a turn is compared with the
peer's turn of the same round.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.cluster import RayRun, connect
from jobs.assembly import assemble
from jobs.bench.footprint import footprint_rows
from jobs.bench.pipelining_peer import PeerLayout, PipeliningPeer
from jobs.bench.report import BenchReport
from jobs.bench.resident import (
    Turn,
    beside,
    ratio,
    resting,
    rounds_of_turns,
    turn_takers,
    wait_for,
)
from jobs.recipe.recipe import Recipe

GOAL_EXACT, GOAL_FAST, GOAL_MEMORY = 0.98, 1.0, 1.1
WORKERS, STAGES = 4, 2
MICRO_BATCHES, MICRO_BATCH_SIZE = 16, 8
ROUNDS, STEPS_PER_TURN = 13, 2
WARM_UP_STEPS = 3
MODEL = {"width": 192, "depth": 6, "heads": 6, "context": 128, "dropout": 0.1, "tied": False}
Bounds = tuple[int, ...]
"""The first layer of every stage, and the number of layers."""

PEER = "torch pipelining + data parallel"


def recipe(reduction: str, build: str = "jobs.models.gpt:build", **arguments: Any) -> Recipe:
    """The run that is measured. It would go on for longer than any bench lasts."""
    return Recipe.model_validate(
        {
            "run": {"name": "overhead", "steps": 100_000, "seed": 1},
            "model": {"build": build, "arguments": {**MODEL, **arguments}},
            "data": {"arguments": {"source": "python-stdlib", "context": MODEL["context"]}},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 10, "clip_norm": 1.0},
            "parallel": {
                "workers": WORKERS,
                "stages": STAGES,
                "micro_batches": MICRO_BATCHES,
                "micro_batch_size": MICRO_BATCH_SIZE,
                "cpus_per_worker": 0.0,
            },
            "reduction": reduction,
            "metrics": {"enabled": False},
            # whoever is not at turn is stopped on purpose
            "detection": {"silence_seconds": 3600.0, "stuck_seconds": 3600.0},
        }
    )


def run(console: Console) -> BenchReport:
    """Measures; takes about ten minutes. Raises RuntimeError if a job stops by itself."""
    tokens = MICRO_BATCHES * MICRO_BATCH_SIZE * int(MODEL["context"])
    with tempfile.TemporaryDirectory() as folder, connect(None, 2 * WORKERS, 1.0, 0.0):
        turns, cuts = _throughput(Path(folder), console)
        console.print("measuring memory", highlight=False)
        memory = footprint_rows(recipe, Path(folder) / "memory")
    rows: list[Mapping[str, str | float | int | None]] = [
        *beside(turns, PEER, tokens),
        *(
            {"what": part.name, "bytes_measured": part.measured, "bytes_in_theory": part.theory}
            for part in memory
        ),
    ]
    exact, fast = (ratio(turns[f"reknit {reduction}"], turns[PEER]) for reduction in ("exact", "fast"))
    over_theory = max(part.measured / part.theory for part in memory if part.theory and part.is_total)
    headline = {
        "exact_ratio": exact,
        "fast_ratio": fast,
        "memory_over_theory": over_theory,
    }
    return BenchReport(
        bench="overhead",
        headline=headline,
        goal=f"exact_ratio >= {GOAL_EXACT}, fast_ratio >= {GOAL_FAST:.1f}, "
        f"memory_over_theory <= {GOAL_MEMORY}",
        met=exact >= GOAL_EXACT and fast >= GOAL_FAST and over_theory <= GOAL_MEMORY,
        rows=tuple(rows),
        notes=(
            f"GPT of width {MODEL['width']}, depth {MODEL['depth']}, {tokens} tokens a step in "
            f"{MICRO_BATCHES} micro-batches of {MICRO_BATCH_SIZE} samples; {STAGES} stages of "
            f"{WORKERS // STAGES} workers, one thread each, cut at layers "
            + ", ".join(f"{cut[1]} ({name})" for name, cut in cuts.items()),
            f"{ROUNDS} rounds of turns; a ratio is the median over the rounds. Ray's own processes ran "
            "during the peer's turns too. Core seconds are the processor time of a job's processes per step, "
            "which others on the machine hardly touch",
            "memory in bytes of exact sums: parameters 4P, sums 8P, state of two steps 24P/g, copies of "
            "others' 24P/g, activations = micro-batches in flight x those of one",
        ),
    )


def _throughput(folder: Path, console: Console) -> tuple[dict[str, list[Turn]], dict[str, Bounds]]:
    """Seconds of the steps by name and round, and the layers' cuts: the peer takes over that of exact."""
    names = {f"reknit {reduction}": recipe(reduction) for reduction in ("exact", "fast")}
    with resting(names, folder, WARM_UP_STEPS, console) as runs:
        cuts = {name: _cut(run) for name, run in runs.items()}
        cuts[PEER] = cuts["reknit exact"]
        console.print("starting the peer", highlight=False)
        niceness = os.getpriority(os.PRIO_PROCESS, next(iter(runs["reknit exact"].processes().values())))
        job = assemble(recipe("exact"), str(folder))
        with PipeliningPeer(PeerLayout(cuts[PEER], WORKERS // STAGES), job, niceness) as peer:
            wait_for("the first steps of the peer", lambda: len(peer.poll(0.1)) >= WARM_UP_STEPS)
            jobs = turn_takers(runs)
            jobs[PEER] = (list(peer.processes().values()), partial(peer.poll, 0.0))
            return rounds_of_turns(jobs, ROUNDS, STEPS_PER_TURN, console), cuts


def _cut(run: RayRun) -> Bounds:
    plan = run.plan()
    assert plan is not None, "a run that has committed steps has a plan"
    return (0, *(stage.stop for stage in plan.stages))
