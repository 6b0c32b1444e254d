"""The set's Parquet files: which rows go into which, and how one is written."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.curation.decide import Decision, Row
from jobs.curation.work import Work
from jobs.data.curated import SCHEMA, DataFile
from jobs.data.tokenizer import CaptionTokenizer

_ROWS_PER_GROUP = 64
_SETTINGS: dict[str, Any] = {
    # said one by one: they are part of the files' bits
    "row_group_size": _ROWS_PER_GROUP,
    "compression": "zstd",
    "compression_level": 3,
    # rows of one item lie together, so a dictionary holds their image once
    "use_dictionary": ["item", "category", "language", "image"],
    "dictionary_pagesize_limit": 64 << 20,
    "data_page_size": 1 << 20,
    "write_statistics": ["sample", "item", "category", "language"],
    "version": "2.6",
    "data_page_version": "1.0",
}


@dataclass(frozen=True)
class Shard:
    """A file to write. ``rows`` is JSON: what a worker needs to know of every row."""

    name: str
    rows: str


def shards(decision: Decision, rows_per_shard: int) -> Iterator[tuple[str, Shard]]:
    """(split, shard), every split in order; a split without rows has one empty file."""
    for split, rows in decision.splits.items():
        count = max(1, -(-len(rows) // rows_per_shard))
        for number in range(count):
            part = rows[number * rows_per_shard : (number + 1) * rows_per_shard]
            name = f"{split}-{number:05d}-of-{count:05d}.parquet"
            yield split, Shard(name, json.dumps([_plan(row) for row in part]))


def _plan(row: Row) -> dict[str, Any]:
    return {
        "sample": row.sample,
        "item": row.seen.name,
        "category": row.seen.category,
        "language": row.language,
        "caption": row.caption,
        "width": row.seen.width,
        "height": row.seen.height,
        "place": [row.seen.file, row.seen.row],
        "clip": None if row.clip is None else row.clip.place,
    }


def write_shard(shard: Shard, work: Work, tokenizer: CaptionTokenizer) -> DataFile:
    """Tokenises the captions, fetches images and sounds, and writes the file, unless it is there already."""
    if (before := work.recorded(shard.name)) is not None:
        return before
    rows = json.loads(shard.rows)
    payload = work.payload((tuple(row["place"]) for row in rows), ("image", "sounds"))
    for row in rows:
        found, clip = payload[tuple(row.pop("place"))], row.pop("clip")
        row["tokens"] = tokenizer.encode(row["caption"])
        row["image"] = found["image"]
        row["audio"] = None if clip is None else found["sounds"][clip]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, **_SETTINGS)
    content = buffer.getvalue()
    work.publish(shard.name, content)
    file = DataFile(
        name=shard.name, rows=len(rows), bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )
    work.record(file)
    return file
