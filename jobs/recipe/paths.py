"""What a recipe may say of micro-batches that do not pass all of the model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from jobs.recipe.choices import AUTO
from strategies.schedules.registry import SCHEDULES, skipping_schedules
from strategies.skippipe.paths import swaps_allowed
from strategies.skippipe.search import search_terms


class Paths(BaseModel):
    """For ``schedule = "skippipe"``: the model in ``stages`` and its end, of which every micro-batch passes
    ``taken`` and the end, at most ``swaps`` of them late (default: 2, or 0 where nothing is skipped)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    stages: PositiveInt
    taken: PositiveInt
    swaps: Annotated[int, Field(ge=0)] | None = None

    def numerics(self) -> dict[str, Any]:
        """What every micro-batch's path follows from."""
        swaps = swaps_allowed(self.stages, self.taken, self.swaps)
        return {**self.model_dump(), "swaps": swaps, "search": search_terms()}


def check_paths(
    schedule: str, paths: Paths | None, slices: int, engine: str, recompute: object, sharding: str
) -> None:
    """Raises ValueError for a combination that cannot be."""
    skips = schedule in SCHEDULES and SCHEDULES[schedule].skips
    if skips != (paths is not None):
        named = schedule if skips else skipping_schedules()
        raise ValueError(f'parallel.schedule = "{named}" and [paths] belong together: give both, or neither.')
    if paths is not None and engine != "reknit":
        raise ValueError(f"[paths] does not go with engine.name = {engine!r}: remove one of them.")
    for key, value in (("precision.recompute", recompute), ("parallel.sharding", sharding)):
        if paths is not None and value == AUTO:
            raise ValueError(
                f'[paths] does not go with {key} = "{AUTO}", which has the layers cut anew: name it, or '
                "remove [paths]."
            )
    if paths is not None and slices > 1:
        raise ValueError(f"[paths] does not go with parallel.sequence_slices ({slices}): remove one of them.")
