"""Writes given rows as a curated set, for benches and tests: nothing is examined and nothing dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.data.curated import MANIFEST, SCHEMA, TOKENIZER, Column, DataFile, Manifest
from jobs.data.tokenizer import CaptionTokenizer


def write_given_set(
    folder: Path,
    tokenizer: CaptionTokenizer,
    splits: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    *,
    rows_per_group: int,
    image_size: int,
    **told: Any,
) -> None:
    """``splits`` names the rows (by ``SCHEMA``) of every file of every split; ``folder`` is there already.

    ``told`` takes the place of what the manifest says by default.
    """
    tokenizer.save(folder / TOKENIZER)
    listed: dict[str, tuple[DataFile, ...]] = {}
    for split, files in splits.items():
        written = []
        for number, rows in enumerate(files):
            name = f"{split}-{number:05d}-of-{len(files):05d}.parquet"
            table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
            pq.write_table(table, folder / name, row_group_size=rows_per_group)
            content = (folder / name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            written.append(DataFile(name=name, rows=len(rows), bytes=len(content), sha256=digest))
        listed[split] = tuple(written)
    values: dict[str, Any] = {
        "name": "drawn",
        "digest": "0" * 64,
        "audio_rate": None,
        "read": sum(len(rows) for files in splits.values() for rows in files),
        "categories": {},
        "languages": {},
        "clips": {},
        "drops": (),
        "source": {},
        "recipe": {},
    }
    manifest = Manifest(
        image_size=image_size,
        columns=tuple(Column(name=each.name, type=str(each.type), nullable=each.nullable) for each in SCHEMA),
        splits=listed,
        tokenizer_sha256=hashlib.sha256((folder / TOKENIZER).read_bytes()).hexdigest(),
        vocabulary=tokenizer.vocabulary,
        **{**values, **told},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")
