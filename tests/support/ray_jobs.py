"""The toy job as a recipe, for runs on real Ray, and a look at the processes that such a run leaves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs.assembly import optimizer_settings
from jobs.recipe.recipe import Recipe
from tests.support.expected import Bits, reference_bits

TOKEN = "REKNIT_TEST_TOKEN"
"""Set in the environment of a child, and so in that of all processes that come from it."""


PACED = {"build": "tests.support.toys:build_paced_tokens", "arguments": {"seconds": 0.2}}
"""The toy job's data for a run that other things are done to: its steps leave the processor to them."""


def toy_recipe(name: str, steps: int, workers: int, stages: int | str, **sections: Any) -> Recipe:
    """Micro-batches, seed and data of ``toy_job``. ``sections`` replace or add whole sections.

    Work is not divided by speed: on a busy machine a worker can look so slow that it is sent away. And layers
    take a millisecond, else messages take longer than they do and fewer workers may be faster.
    """
    parallel = {
        "workers": workers,
        "stages": stages,
        "micro_batches": 5,
        "micro_batch_size": 2,
        "cpus_per_worker": 0.25,
    }
    return Recipe.model_validate(
        {
            "run": {"name": name, "steps": steps, "seed": 7},
            "model": {"build": "tests.support.toys:build_steady"},
            "data": {"build": "tests.support.toys:build_tokens"},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2, "decay_steps": 1000, "clip_norm": 0.5},
            "metrics": {"enabled": False},
            # a busy machine holds up heartbeats; only tests of detection are in a hurry
            "detection": {"silence_seconds": 30.0, "stuck_seconds": 60.0},
            **sections,
            "parallel": {"rebalance": False, **sections.get("parallel", parallel)},
        }
    )


def recipe_bits(recipe: Recipe) -> Bits:
    return reference_bits(recipe.run.steps, optimizer=optimizer_settings(recipe))


def began_at(process: int) -> str | None:
    """When a process was started (clock ticks since boot), None if there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def descendants(token: str) -> list[int]:
    """The living processes that have ``token`` in the environment they were started with."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"{TOKEN}={token}".encode() in environment.split(b"\0") and began_at(int(entry.name)) is not None:
            found.append(int(entry.name))
    return found


def wait_until(
    condition: Callable[[], Any], what: str, seconds: float = 120.0, interval: float = 0.25
) -> Any:
    """The first true value of ``condition``, asked at once, then ever less often, at last every ``interval``
    seconds: whoever answers has other things to do. Fails if there is none in time."""
    deadline, pause = time.monotonic() + seconds, min(0.02, interval)
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(pause)
        pause = min(1.3 * pause, interval)
    raise AssertionError(f"not within {seconds} s: {what}")


def with_token(token: str) -> Mapping[str, str]:
    return {**os.environ, TOKEN: token}
