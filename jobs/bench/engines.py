"""``reknit bench engines``: a worker of a DeepSpeed job is killed; how long until the next step?

The same model, data, batch and number of workers three times: DeepSpeed engines under Reknit, whose survivors
keep their processes; Reknit's own engine; and DeepSpeed as its users run it, with all processes started anew
from its newest checkpoint. The cost of a kill is the time from just before the signal to the first step that
the new group has made, less an undisturbed step of the same run.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console

from jobs.bench.deepspeed_peer import RestartingRun
from jobs.bench.kills import Recovery, phase_row, recovery, summary
from jobs.bench.recovery import RECIPE, Measurement, measure
from jobs.bench.report import BenchReport
from jobs.recipe.recipe import Recipe

GOAL_RATIO = 10.0
STAGES = (1, 3)
"""ZeRO stages under Reknit; the restart is measured with the first, which loads its checkpoint fastest."""

CHECKPOINT_EVERY = 10
"""Steps of the group that restarts. That they are then done again is not counted: the first step after a
restart ends the recovery."""

KILLS = 2
STEPS_BEFORE_KILL = 25
PATIENCE_SECONDS = 120.0


def recipe_of(stage: int | None, checkpoint_every: int = 0) -> Recipe:
    """The recovery bench's job in one stage group; with ``stage`` by DeepSpeed engines of that ZeRO stage."""
    values = RECIPE.model_dump()
    values["checkpoint"]["every"] = checkpoint_every
    values["run"]["name"] = "bench-engines"
    values["parallel"]["stages"] = 1
    if stage is not None:
        values["engine"] = {"name": "deepspeed", "settings": {"zero_optimization": {"stage": stage}}}
    return Recipe.model_validate(values)


def run(console: Console) -> BenchReport:
    """Measures; three minutes. Raises ValueError if DeepSpeed is not installed."""
    if find_spec("deepspeed") is None:
        raise ValueError("DeepSpeed is not installed: pip install -c constraints.txt -e '.[deepspeed]'")
    random_ = random.Random(RECIPE.run.seed)
    engines = {}
    for stage in STAGES:
        console.print(f"DeepSpeed ZeRO-{stage} under Reknit: {KILLS} kills", highlight=False)
        engines[stage] = measure(recipe_of(stage), 1, KILLS, random_, console)
        console.print(f"  {_middle(engines[stage].recoveries):.4g} s", highlight=False)
    console.print(f"Reknit's own engine: {KILLS} kills", highlight=False)
    own = measure(recipe_of(None), 1, KILLS, random_, console)
    console.print(f"DeepSpeed, restarted: {KILLS} kills", highlight=False)
    return report(engines, own, restarts(recipe_of(STAGES[0], CHECKPOINT_EVERY), random_))


def _middle(recoveries: Sequence[Recovery]) -> float:
    return median(each.seconds for each in recoveries)


def restarts(recipe: Recipe, random_: random.Random) -> list[Recovery]:
    """Kills a rank of DeepSpeed's own group, again and again, each of which restarts it."""
    with TemporaryDirectory(prefix="reknit-bench-") as folder, RestartingRun(recipe, Path(folder)) as peer:
        killed_at = []
        for kill in range(KILLS):
            peer.wait_for(STEPS_BEFORE_KILL, kill, PATIENCE_SECONDS)
            time.sleep(random_.uniform(0.0, 0.5))
            killed_at.append(time.time())
            os.kill(peer.ranks[1 + random_.randrange(len(peer.ranks) - 1)].pid, signal.SIGKILL)
        peer.wait_for(2, KILLS, PATIENCE_SECONDS)
        commits = peer.commits()
    found = [recovery(commits, at) for at in killed_at]
    return [each for each in found if each is not None]


def report(engines: dict[int, Measurement], own: Measurement, restarted: Sequence[Recovery]) -> BenchReport:
    """The table and the headline. Pure."""
    batch = RECIPE.parallel.micro_batches * RECIPE.parallel.micro_batch_size
    rows = []
    for stage, measured in engines.items():
        rows.append(summary(f"DeepSpeed ZeRO-{stage} under Reknit", measured.recoveries, batch))
        rows += [phase_row(f"  {name}", seconds) for name, seconds in measured.phases.items()]
    rows.append(summary("Reknit's own engine", own.recoveries, batch))
    rows.append(summary("DeepSpeed, restarted from its checkpoint", restarted, batch))
    middle = {stage: _middle(measured.recoveries) for stage, measured in engines.items()}
    restart = _middle(restarted)
    ratio = restart / max(middle.values())
    return BenchReport(
        bench="engines",
        headline={
            **{f"zero{stage}_median_seconds": seconds for stage, seconds in middle.items()},
            "own_median_seconds": _middle(own.recoveries),
            "restart_median_seconds": restart,
            "ratio_to_restart": ratio,
        },
        goal=f"the slowest stage's median at least {GOAL_RATIO:g} times faster than a restart",
        met=ratio >= GOAL_RATIO,
        rows=tuple(rows),
        notes=(
            "seconds count from the SIGKILL to the first step of the new group, less an undisturbed step",
            "the restarted group has all its ranks again; the others go on with one fewer",
            "steps that a restart does again from its checkpoint are not counted against it",
        ),
    )
