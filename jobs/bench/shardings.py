"""What every sharding keeps and sends, measured in a real run, beside theory; and whether the bits are equal.

Real Ray actors in one stage group, exact sums, no emulation. Bytes sent are those of a whole step over the
sockets, headers and notes included; bytes kept are parameters, sums, shards and backups.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from actors.cluster import connect
from jobs.assembly import assemble
from jobs.bench.report import BenchReport
from jobs.bench.resident import started, wait_for
from jobs.recipe.recipe import Recipe
from runtime.protocol import Measured
from strategies.model import build_model
from strategies.options import Offload
from strategies.shardings.registry import DEFAULT, SHARDINGS
from strategies.shardings.theory import part_of, resident_bytes, sent_bytes

WORKERS, MICRO_BATCHES, STEPS = 3, 6, 30
SETTLED = 3
"""From which step on what is kept no longer grows: there are two versions to keep."""

MODEL = {"vocabulary": 512, "width": 128, "depth": 6, "heads": 4, "context": 64}
SLACK = 0.01
"""What headers, requests and notes may add to the bytes sent."""

CASES: tuple[tuple[str, Offload | None], ...] = (
    *((name, None) for name in SHARDINGS),
    (DEFAULT, Offload(2, 1)),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: bytes of the worker that keeps, and of the one that sends, the most; ``bits`` are the loss,
    the gradient's norm and the fingerprint of every step."""

    sharding: str
    offload: Offload | None
    kept: int
    kept_theory: float
    sent: float
    sent_theory: float
    on_device: float
    step_seconds: float
    bits: tuple[tuple[float, float, int], ...]


def recipe(sharding: str, offload: Offload | None) -> Recipe:
    """The run that is measured."""
    parallel: dict[str, Any] = {
        "workers": WORKERS,
        "stages": 1,
        "micro_batches": MICRO_BATCHES,
        "micro_batch_size": 4,
        "sharding": sharding,
        "cpus_per_worker": 0.0,
        "rebalance": False,
    }
    if offload is not None:
        parallel["offload"] = {"window": offload.window, "move": offload.move}
    return Recipe.model_validate(
        {
            "run": {"name": "shardings", "steps": STEPS, "seed": 1},
            "model": {"arguments": MODEL},
            "data": {"arguments": {"source": "python-stdlib", "context": MODEL["context"]}},
            "optimizer": {"learning_rate": 1e-3, "clip_norm": 1.0},
            "parallel": parallel,
            "metrics": {"enabled": False},
        }
    )


def measure(sharding: str, offload: Offload | None, folder: Path) -> Outcome:
    """Runs to the end. Raises RuntimeError if that does not come, or without every step's bits."""
    made = recipe(sharding, offload)
    told: dict[int, dict[int, Measured]] = {}
    with started(made, folder) as run:

        def ended() -> bool:
            for worker, measured in run.measured().items():
                told.setdefault(worker, {})[measured.step] = measured
            return run.progress(0, 0).outcome is not None

        wait_for(f"the end of {sharding}", ended, poll_seconds=0.02)
        plan, progress = run.plan(), run.progress(0, 0)
    if progress.outcome != "completed" or plan is None:
        raise RuntimeError(f"the run with {sharding} did not complete: {progress.message}")
    job = assemble(made, str(folder))
    layout = build_model(job.build_model, job.seed).layout
    parts = {worker: part_of(layout, plan, worker) for worker in plan.workers}
    kept = {worker: resident_bytes(sharding, part, offload) for worker, part in parts.items()}
    largest = max(kept, key=lambda worker: kept[worker].total)
    sent = {worker: sent_bytes(sharding, part).total for worker, part in parts.items()}
    sender = max(sent, key=sent.__getitem__)
    return Outcome(
        sharding,
        offload,
        kept=kept_bytes(told[largest]),
        kept_theory=kept[largest].total,
        sent=sent_per_step(told[sender]),
        sent_theory=sent[sender],
        on_device=kept[largest].device,
        step_seconds=median(record.seconds for record in progress.steps[SETTLED - 1 :]),
        bits=tuple((each.loss, each.grad_norm, each.fingerprint) for each in progress.steps),
    )


def kept_bytes(told: Mapping[int, Measured]) -> int:
    """The most that one worker had at the end of any step since ``SETTLED``."""
    return max(
        sum(bytes for kind, bytes in each.resident_bytes.items() if kind != "inbox_peak")
        for step, each in told.items()
        if step >= SETTLED
    )


def sent_per_step(told: Mapping[int, Measured]) -> float:
    """Between the first and the last of the steps that were seen since ``SETTLED``. Copies to backups are on
    their way as a worker tells of its step: a part of one step's is counted or not, over all of them."""
    steps = sorted(step for step in told if step >= SETTLED)
    if len(steps) < 2:
        raise RuntimeError(f"of the steps from {SETTLED} on only {steps} were seen: take longer steps")
    first, last = steps[0], steps[-1]
    return (told[last].fabric_bytes["sent"] - told[first].fabric_bytes["sent"]) / (last - first)


def report(results: Sequence[Outcome]) -> BenchReport:
    """The table."""
    kept = max(abs(each.kept / each.kept_theory - 1.0) for each in results)
    sent = max(abs(each.sent / each.sent_theory - 1.0) for each in results)
    differing = [each.sharding for each in results if each.bits != results[0].bits]
    return BenchReport(
        bench="shardings",
        headline={
            "worst_kept_deviation": kept,
            "worst_sent_deviation": sent,
            "runs_with_other_bits": float(len(differing)),
        },
        goal=f"kept: 0; sent: <= {SLACK} (headers and notes); bits equal to {results[0].sharding}'s",
        met=kept == 0.0 and sent <= SLACK and not differing,
        rows=tuple(
            {
                "sharding": each.sharding,
                "window": None if each.offload is None else each.offload.window,
                "move": None if each.offload is None else each.offload.move,
                "kept_mb": each.kept / 1e6,
                "of_theory": each.kept / each.kept_theory,
                "device_mb": each.on_device / 1e6,
                "sent_mb": each.sent / 1e6,
                "sent_of_theory": each.sent / each.sent_theory,
                "step_seconds": each.step_seconds,
                "bits": "equal" if each.bits == results[0].bits else "other",
            }
            for each in results
        ),
        notes=(
            f"a stage group of {WORKERS} workers, {MICRO_BATCHES} micro-batches, {STEPS} steps, real "
            "processes and sockets; of the worker that keeps, and of the one that sends, the most",
            "kept: parameters, sums, shards and backups; device: what of it an accelerator would have, by "
            "theory. On a CPU an offload's window comes on top of the parameters at home",
            "zero2 and zero3 send with every micro-batch, the others once a step; backups are included",
        ),
    )


def run(console: Console) -> BenchReport:
    """Measures; takes about two minutes. Raises RuntimeError if a run ends early."""
    results = []
    with tempfile.TemporaryDirectory() as folder, connect(None, WORKERS, 1.0, 0.0):
        for number, (sharding, offload) in enumerate(CASES):
            results.append(measure(sharding, offload, Path(folder) / f"{number}"))
            each = results[-1]
            console.print(
                f"{sharding}{'' if offload is None else f', window {offload.window}'}: keeps "
                f"{each.kept:,} bytes ({each.kept_theory:,.0f}), sends {each.sent:,.0f} a step "
                f"({each.sent_theory:,.0f})",
                highlight=False,
            )
    return report(results)
