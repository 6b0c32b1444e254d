"""Data that writes down when a worker begins each step: what happens while nobody keeps a run's record.

The record is the controller's. While there is none, the workers go on; whoever begins step s + 1 has
committed step s, so the moments at which their data is first read for a step tell of the commits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from jobs.bench.kills import Commit
from jobs.builders import build_data
from jobs.recipe.recipe import Recipe

_SUFFIX = ".begun"


def witnessed(recipe: Recipe, folder: Path) -> Recipe:
    """``recipe`` with its data seen through ``build``; the marks are kept in ``folder``, which must exist."""
    inner = {"of": recipe.data.build, "arguments": recipe.data.arguments, "folder": str(folder)}
    data = recipe.data.model_copy(update={"build": "jobs.bench.witness:build", "arguments": inner})
    return recipe.model_copy(update={"data": data})


def build(
    *,
    of: str,
    arguments: Mapping[str, Any],
    folder: str,
    micro_batch_size: int,
    micro_batches: int,
    seed: int,
) -> Witness:
    """The data of the builder ``of``. Raises ValueError if it cannot be found or called so."""
    sizes = {"micro_batch_size": micro_batch_size, "micro_batches": micro_batches, "seed": seed}
    return Witness(build_data(of, {**arguments, **sizes}), Path(folder))


class Witness:
    """Hands out ``data``; marks in a file per process when a step's data is first asked for."""

    def __init__(self, data: Any, folder: Path) -> None:
        self._data, self._folder = data, folder
        self._newest = 0
        self.digest: str | None = getattr(data, "digest", None)
        self.tokens_per_sample: int = getattr(data, "tokens_per_sample", 0)

    def micro_batch(self, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        if step > self._newest:
            self._newest = step
            # opened anew each time, as the process that built this may hand it to another one
            with (self._folder / f"{os.getpid()}{_SUFFIX}").open("a", encoding="utf-8") as marks:
                marks.write(f"{step} {time.time():.6f}\n")
        pair: tuple[Tensor, Tensor] = self._data.micro_batch(step, micro_batch)
        return pair

    def held_out(self, micro_batch: int) -> tuple[Tensor, Tensor]:
        pair: tuple[Tensor, Tensor] = self._data.held_out(micro_batch)
        return pair


def commits_seen(folder: Path) -> list[Commit]:
    """A commit for each step that somebody has begun, at the first one's moment; ascending in time."""
    first: dict[int, float] = {}
    for path in folder.glob(f"*{_SUFFIX}"):
        *whole, _ = path.read_text(encoding="utf-8").split("\n")
        for step, at in (line.split() for line in whole):
            first[int(step)] = min(float(at), first.get(int(step), float("inf")))
    return [Commit(at, 0) for at in sorted(first.values())]
