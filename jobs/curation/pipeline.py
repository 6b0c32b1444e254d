"""The work that Ray Data spreads over workers: units are read and looked at, and shards are written.

Both pipelines stream: a block of units goes through all operators of its task while others wait, and what
comes back to the driver is small. Nothing depends on who does what or when it is done; order is made later,
from names (``decide``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import pyarrow as pa
import ray.data

from jobs.curation.examine import examine_table
from jobs.curation.items import Unit, item_table
from jobs.curation.recipe import CurationRecipe
from jobs.curation.shards import Shard, write_shard
from jobs.curation.sources import read_unit, units_per_task
from jobs.curation.work import Work
from jobs.data.curated import DataFile
from jobs.data.tokenizer import CaptionTokenizer

_ITEMS_PER_FILE = 32

OnProgress = Callable[[int], None]
"""Called with how many more are done."""


def examine_units(units: Sequence[Unit], recipe: CurationRecipe, work: Work, progress: OnProgress) -> None:
    """Reads every unit, looks at its items and keeps what was seen. Units that are done once are never done
    again, also after an interruption."""
    _quiet()
    if not units:
        return
    rows = [{"key": unit.key, "detail": unit.detail} for unit in units]
    blocks = -(-len(rows) // units_per_task(recipe))
    kept = (
        ray.data.from_items(rows, override_num_blocks=blocks)
        .map_batches(partial(_read, recipe=recipe), batch_size=1, batch_format="pyarrow")
        .map_batches(partial(examine_table, recipe=recipe), batch_size=1, batch_format="pyarrow")
        .map_batches(partial(_keep, work=work), batch_size=_ITEMS_PER_FILE, batch_format="pyarrow")
    )
    for batch in _tables(kept):
        progress(sum(batch["last"].to_pylist()))


def write_shards(
    shards: Sequence[Shard], work: Work, tokenizer: CaptionTokenizer, progress: OnProgress
) -> dict[str, DataFile]:
    """Writes every shard that is not there; their files by name."""
    _quiet()
    rows = [{"name": shard.name, "rows": shard.rows} for shard in shards]
    written = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        partial(_write, work=work, tokenizer=tokenizer), batch_size=1, batch_format="pyarrow"
    )
    files = {}
    for batch in _tables(written):
        for text in batch["file"].to_pylist():
            file = DataFile.model_validate_json(text)
            files[file.name] = file
            progress(1)
    return files


def _tables(dataset: ray.data.Dataset) -> Iterable[pa.Table]:
    """The blocks of ``dataset``, as soon as each is there."""
    tables: Iterable[pa.Table] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return tables


def _read(units: pa.Table, recipe: CurationRecipe) -> Iterator[pa.Table]:
    for row in units.to_pylist():
        unit, number, waiting = Unit(row["key"], row["detail"]), 0, None
        for item in read_unit(unit, recipe):
            if waiting is not None:
                yield item_table(unit.key, number, False, waiting)
                number += 1
            waiting = item
        assert waiting is not None
        yield item_table(unit.key, number, True, waiting)


def _keep(examined: pa.Table, work: Work) -> pa.Table:
    work.keep(examined)
    return examined.select(["last"])


def _write(shards: pa.Table, work: Work, tokenizer: CaptionTokenizer) -> pa.Table:
    files = [write_shard(Shard(row["name"], row["rows"]), work, tokenizer) for row in shards.to_pylist()]
    return pa.table({"file": [file.model_dump_json() for file in files]})


def _quiet() -> None:
    """The command has a progress bar of its own."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
