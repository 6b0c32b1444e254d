"""The recipe of a bench whose layers sleep instead of computing (``emulated``)."""

from __future__ import annotations

from typing import Any

from jobs.recipe.recipe import Recipe


def recipe_of(
    name: str,
    parallel: dict[str, Any],
    *,
    steps: int = 100_000,
    build: str = "jobs.bench.emulated:build",
    paths: dict[str, int] | None = None,
    **arguments: Any,
) -> Recipe:
    """A run that would go on for longer than the bench lasts, of micro-batches of one sample. ``arguments``
    are those of the model's ``build``."""
    return Recipe.model_validate(
        {
            "run": {"name": name, "steps": steps, "seed": 1},
            "model": {"build": build, "arguments": arguments},
            "data": {"build": "jobs.bench.emulated:build_data"},
            "optimizer": {"learning_rate": 1e-4},
            "parallel": {"micro_batch_size": 1, **parallel},
            "paths": paths,
            "metrics": {"enabled": False},
        }
    )
