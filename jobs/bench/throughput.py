"""``reknit bench throughput``: training with nothing lost, beside DeepSpeed's own ZeRO-1.

One stage group: Reknit's ``zero1`` with exact and with fast sums, and DeepSpeed with ZeRO-1 over gloo, train
the same GPT with the same batch and optimizer, resident together, and take turns of a few steps; whoever is
not at turn is stopped by a signal, so that what else the machine does meets all of them alike.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from actors.cluster import connect
from jobs.bench.deepspeed_peer import RestartingRun
from jobs.bench.overhead import MODEL
from jobs.bench.overhead import recipe as overhead_recipe
from jobs.bench.report import BenchReport
from jobs.bench.resident import (
    Turn,
    beside,
    ratio,
    resting,
    rounds_of_turns,
    turn_takers,
)
from jobs.recipe.recipe import Recipe

GOAL = 1.0
ROUNDS, STEPS_PER_TURN, WARM_UP_STEPS = 15, 2, 3
PATIENCE_SECONDS = 180.0
PEER = "DeepSpeed ZeRO-1"


def recipe_of(reduction: str, *, deepspeed: bool = False) -> Recipe:
    """The overhead bench's job in one stage."""
    values = overhead_recipe(reduction).model_dump()
    values["run"]["name"] = "throughput"
    values["parallel"]["stages"] = 1
    if deepspeed:
        config = {"zero_optimization": {"stage": 1}, "gradient_clipping": values["optimizer"]["clip_norm"]}
        values["engine"] = {"name": "deepspeed", "settings": config}
    return Recipe.model_validate(values)


def run(console: Console) -> BenchReport:
    """Measures; takes about a quarter of an hour. Raises ValueError if DeepSpeed is not installed."""
    if find_spec("deepspeed") is None:
        raise ValueError("DeepSpeed is not installed: pip install -c constraints.txt -e '.[deepspeed]'")
    workers = recipe_of("exact").parallel.workers
    with tempfile.TemporaryDirectory(prefix="reknit-bench-") as folder, connect(None, 2 * workers, 1.0, 0.0):
        return report(_turns(Path(folder), console))


def _turns(folder: Path, console: Console) -> dict[str, list[Turn]]:
    names = {f"reknit {reduction}": recipe_of(reduction) for reduction in ("exact", "fast")}
    with resting(names, folder, WARM_UP_STEPS, console) as runs:
        jobs = turn_takers(runs)
        console.print(f"starting {PEER}", highlight=False)
        niceness = os.getpriority(os.PRIO_PROCESS, next(iter(jobs.values()))[0][0])
        (folder / "peer").mkdir()
        with RestartingRun(recipe_of("fast", deepspeed=True), folder / "peer", niceness) as peer:
            peer.wait_for(WARM_UP_STEPS, 0, PATIENCE_SECONDS)
            jobs[PEER] = [rank.pid for rank in peer.ranks], lambda: [commit.at for commit in peer.commits()]
            return rounds_of_turns(jobs, ROUNDS, STEPS_PER_TURN, console)


def report(turns: Mapping[str, Sequence[Turn]]) -> BenchReport:
    """The table and the headline. Pure."""
    parallel = recipe_of("exact").parallel
    tokens = parallel.micro_batches * parallel.micro_batch_size * int(MODEL["context"])
    rows = beside(turns, PEER, tokens)
    exact, fast = (ratio(turns[f"reknit {reduction}"], turns[PEER]) for reduction in ("exact", "fast"))
    return BenchReport(
        bench="throughput",
        headline={"exact_ratio": exact, "fast_ratio": fast},
        goal=f"both at least {GOAL:.1f} times DeepSpeed's",
        met=min(exact, fast) >= GOAL,
        rows=tuple(rows),
        notes=(
            f"GPT of width {MODEL['width']}, depth {MODEL['depth']}, {tokens} tokens a step in "
            f"{parallel.micro_batches} micro-batches; one stage of {parallel.workers} workers of one thread",
            f"{ROUNDS} rounds of turns; a ratio is the median over the rounds. Ray's own processes ran "
            "during the peer's turns too",
        ),
    )
