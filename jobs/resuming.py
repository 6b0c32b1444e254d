"""Whether a recipe may go on with a run: told before anything of the run is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jobs.recipe.recipe import Recipe, load_recipe
from runtime.run_folder import RunFolder


def refuse_another_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """Raises ValueError, which names what differs, if ``recipe`` computes other bits than the run there."""
    if not folder.exists() or folder.facts().get("numerics") in (None, recipe.numerics_digest()):
        return
    try:
        before = load_recipe(folder.recipe).numerics()
    except ValueError:  # of a version that had other keys
        before = {}
    changed = [
        f"{key} is {now!r} and was {then!r}" for key, then, now in _differences(before, recipe.numerics())
    ]
    raise ValueError(
        f"{folder.recipe}: this recipe would not go on with the run's bits"
        + (f" ({'; '.join(changed)})" if changed else "")
        + ": set it as it was, or start a new run without --resume"
    )


def _differences(
    before: Mapping[str, object], after: Mapping[str, object], above: str = ""
) -> Iterator[tuple[str, object, object]]:
    """(dotted key, value before, value after) of what both say differently."""
    for key in before.keys() & after.keys():
        then, now = before[key], after[key]
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            yield from _differences(
                {name: then.get(name) for name in {*then, *now}},
                {name: now.get(name) for name in {*then, *now}},
                f"{above}{key}.",
            )
        elif then != now:
            yield f"{above}{key}", then, now
