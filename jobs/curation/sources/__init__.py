"""Where raw items come from. A source lists its units at once and reads one unit at a time, anywhere.

Listing raises ValueError if there is nothing to read. Reading raises nothing: what cannot be read comes out
as an item with a ``problem``, so that one broken file costs what is in it and no more.
"""

from __future__ import annotations

from collections.abc import Iterator

from jobs.curation.items import Item, Unit
from jobs.curation.recipe import CurationRecipe
from jobs.curation.sources import image_folder, parquet, tuxpaint, webdataset

_KINDS = {
    "tuxpaint": tuxpaint,
    "image_folder": image_folder,
    "parquet": parquet,
    "webdataset": webdataset,
}


def list_units(recipe: CurationRecipe) -> list[Unit]:
    """The recipe's source, cut up: ordered by key. Their ``detail`` changes when what is there changes."""
    found = (
        # names of files need not be UTF-8
        Unit(unit.key.encode("utf-8", "backslashreplace").decode(), unit.detail)
        for unit in _KINDS[recipe.source.kind].units(recipe)
    )
    return sorted(found, key=lambda unit: unit.key)


def units_per_task(recipe: CurationRecipe) -> int:
    """How many are worth a task of their own: few where one unit holds many items."""
    count: int = _KINDS[recipe.source.kind].UNITS_PER_TASK
    return count


def read_unit(unit: Unit, recipe: CurationRecipe) -> Iterator[Item]:
    """The unit's items: always the same ones in the same order, and at least one."""
    count = 0
    for item in _KINDS[recipe.source.kind].read(unit, recipe):
        count += 1
        yield item
    if not count:
        yield Item(unit.key, recipe.source.category, problem="there is nothing in it")
