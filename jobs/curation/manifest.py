"""What the set says of itself: its manifest, and the list of all that was dropped."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from jobs.curation.decide import Decision, Dropped, Row
from jobs.curation.recipe import CurationRecipe
from jobs.curation.work import recipe_values
from jobs.data.curated import SCHEMA, Column, DataFile, Drop, Manifest
from jobs.data.tokenizer import CaptionTokenizer

FILTERS = (
    "reading",
    "caption",
    "language",
    "encoding",
    "caption_length",
    "image",
    "resolution",
    "aspect",
    "blank",
    "sharpness",
    "duplicate_name",
    "duplicate_image",
    "duplicate_caption",
    "clip_required",
    "balance",
    "clip",
    "clip_length",
    "silence",
    "duplicate_clip",
)
"""In the order in which they are applied; the last four take clips."""

_EXAMPLES = 5


def build_manifest(
    decision: Decision,
    recipe: CurationRecipe,
    tokenizer: CaptionTokenizer,
    splits: Mapping[str, tuple[DataFile, ...]],
) -> Manifest:
    tokenizer_sha256 = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
    values = recipe_values(recipe)
    files = [(split, file.model_dump()) for split, listed in splits.items() for file in listed]
    content = json.dumps([values, tokenizer_sha256, files], sort_keys=True)
    return Manifest(
        name=recipe.set.name,
        digest=hashlib.sha256(content.encode()).hexdigest(),
        image_size=recipe.set.image_size,
        audio_rate=recipe.set.audio_rate if recipe.clip.keep else None,
        columns=tuple(Column(name=each.name, type=str(each.type), nullable=each.nullable) for each in SCHEMA),
        splits=dict(splits),
        tokenizer_sha256=tokenizer_sha256,
        vocabulary=tokenizer.vocabulary,
        read=decision.read,
        categories=_counted(decision, lambda row: row.seen.category),
        languages=_counted(decision, lambda row: row.language),
        clips={split: sum(row.clip is not None for row in rows) for split, rows in decision.splits.items()},
        drops=count_drops(decision.dropped),
        source=values["source"],
        recipe=values,
    )


def _counted(decision: Decision, key: Callable[[Row], str]) -> dict[str, dict[str, int]]:
    return {
        split: dict(sorted(Counter(key(row) for row in rows).items()))
        for split, rows in decision.splits.items()
    }


def count_drops(dropped: Iterable[Dropped]) -> tuple[Drop, ...]:
    """By filter in the order of their application, then the commonest reason first."""
    names: dict[tuple[str, str, str], list[str]] = {}
    for each in dropped:
        names.setdefault((each.verdict.filter, each.what, each.verdict.reason), []).append(each.name)
    ordered = sorted(
        names, key=lambda key: (FILTERS.index(key[0]), key[1] != "rows", -len(names[key]), key[2])
    )
    return tuple(
        Drop(
            filter=key[0],
            what="rows" if key[1] == "rows" else "clips",
            reason=key[2],
            count=len(names[key]),
            examples=tuple(sorted(names[key])[:_EXAMPLES]),
        )
        for key in ordered
    )


def dropped_table(dropped: Iterable[Dropped]) -> bytes:
    """A csv file with a line for everything that was dropped."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("what", "name", "filter", "reason", "like"))
    for each in dropped:
        what = each.what.removesuffix("s")
        writer.writerow((what, each.name, each.verdict.filter, each.verdict.reason, each.like or ""))
    return stream.getvalue().encode()
