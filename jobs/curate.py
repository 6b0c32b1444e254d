"""``reknit curate``: raw images, captions and speech to a set that training reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ray.exceptions import RayError, UserCodeException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from actors.cluster import connect
from jobs.curation.decide import Decision, decide
from jobs.curation.manifest import build_manifest, dropped_table
from jobs.curation.pipeline import examine_units, write_shards
from jobs.curation.recipe import CurationRecipe, load_curation
from jobs.curation.report import report_page
from jobs.curation.shards import shards
from jobs.curation.sources import list_units
from jobs.curation.work import Work, work_key
from jobs.data.curated import MANIFEST, TOKENIZER, DataFile, Manifest, open_set
from jobs.data.tokenizer import CaptionTokenizer
from jobs.exits import RunFailed
from jobs.terminal import plain_console
from runtime.storage import Store

REPORT, DROPPED = "report.html", "dropped.csv"


def curate(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> Manifest:
    """Makes the recipe's set, going on with what an interrupted run has left; returns its manifest.

    ``workers`` is the number of CPUs of a Ray of its own (default: this machine's), unless there is a cluster
    at ``address``. The set's bits do not depend on it. Raises ValueError for a mistake in the recipe, a
    source that is not there and a set of which nothing is left, RunFailed if Ray cannot do the work.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"--workers is {workers}: it must be at least 1")
    checked = load_curation(recipe, overrides)
    console = console or plain_console()
    units = list_units(checked)
    work = Work(Store.open(checked.set.folder), work_key(checked, units))
    if work.done():
        console.print(f"{checked.set.folder} is there already, made from this recipe and this source")
        return open_set(work.store).manifest
    work.begin()
    finished = work.finished_units()
    left = [unit for unit in units if unit.key not in finished]
    if finished:
        console.print(f"{len(units) - len(left):,} of {len(units):,} units were read before")
    with (
        _failures(),
        connect(address, workers or os.cpu_count() or 1, 1, 0),
        _progress(console) as progress,
    ):
        reading = progress.add_task("reading", total=len(units), completed=len(units) - len(left))
        examine_units(left, checked, work, lambda count: progress.advance(reading, count))
        deciding = progress.add_task("deciding", total=1)
        decision = decide(work.seen(unit.key for unit in units), checked)
        _check(decision)
        tokenizer = _tokenizer(decision, checked)
        progress.advance(deciding)
        planned = list(shards(decision, checked.set.rows_per_shard))
        writing = progress.add_task("writing", total=len(planned))
        files = write_shards(
            [shard for _, shard in planned], work, tokenizer, lambda count: progress.advance(writing, count)
        )
    splits: dict[str, tuple[DataFile, ...]] = {
        split: tuple(files[shard.name] for of, shard in planned if of == split) for split in decision.splits
    }
    manifest = build_manifest(decision, checked, tokenizer, splits)
    work.publish(TOKENIZER, tokenizer.to_json().encode())
    work.publish(DROPPED, dropped_table(decision.dropped))
    work.publish(REPORT, report_page(decision, manifest, checked, work))
    work.publish(MANIFEST, manifest.model_dump_json(indent=1).encode())
    work.finish(files)
    _show(manifest, work, console)
    return manifest


@contextmanager
def _failures() -> Iterator[None]:
    """What Ray could not do, such as running a worker that the machine has no memory for."""
    try:
        yield
    except (RayError, UserCodeException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RunFailed(
            f"{lines[-1] if lines else type(error).__name__}; what was read is kept, so start it again"
        ) from error


def _tokenizer(decision: Decision, recipe: CurationRecipe) -> CaptionTokenizer:
    languages = {row.language for rows in decision.splits.values() for row in rows}
    if recipe.tokens.kind == "bytes":
        return CaptionTokenizer(languages)
    captions = (row.caption for row in decision.splits["train"])
    return CaptionTokenizer.train(captions, languages, recipe.tokens.vocabulary)


def _check(decision: Decision) -> None:
    if decision.splits["train"]:
        return
    counts: dict[str, int] = {}
    for each in decision.dropped:
        counts[each.verdict.filter] = counts.get(each.verdict.filter, 0) + (each.what == "rows")
    worst = max(counts, key=lambda name: counts[name], default="split")
    raise ValueError(
        f"nothing is left to train on: of {decision.read:,} rows the filter {worst} dropped "
        f"{counts.get(worst, 0):,}; change its thresholds in the recipe, or the source"
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _show(manifest: Manifest, work: Work, console: Console) -> None:
    table = Table(title=f"{manifest.name}: {manifest.read:,} rows read")
    table.add_column("filter")
    table.add_column("why")
    table.add_column("dropped", justify="right")
    for drop in manifest.drops:
        table.add_row(drop.filter, drop.reason, f"{drop.count:,} {drop.what}")
    console.print(table)
    for split in manifest.splits:
        clips = f", {manifest.clips[split]:,} with a clip" if manifest.audio_rate else ""
        files = len(manifest.splits[split])
        console.print(
            f"{split}: {manifest.rows(split):,} rows in {len(manifest.languages[split])} languages{clips}, "
            f"{files} {'file' if files == 1 else 'files'}",
            highlight=False,
        )
    console.print(f"{work.store.at(REPORT)} shows samples", highlight=False, soft_wrap=True)
