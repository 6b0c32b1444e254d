"""Parquet files with image, text and audio columns; rows with the same item are one item.

An image or a sound is a column of bytes, or a struct with a field ``bytes`` (as data sets on the Hugging Face
Hub have it). Only the image or text column must be there; files lie on any pyarrow filesystem.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from jobs.curation.items import Caption, Clip, Item, Unit
from jobs.curation.recipe import CurationRecipe
from jobs.curation.sources.files import Unreadable, text
from runtime.storage import Store

UNITS_PER_TASK = 1


def units(recipe: CurationRecipe) -> Iterator[Unit]:
    """Row groups, and files that cannot be read."""
    files = list(_files(recipe))
    if not files:
        raise ValueError(f"there is no .parquet file in {recipe.source.path}: set source.path to one")
    store = _store(recipe)
    for info in files:
        name = info.path.removeprefix(store.path).lstrip("/") or info.base_name
        state = f"{info.size}-{info.mtime_ns}"
        try:
            metadata = pq.read_metadata(info.path, filesystem=store.filesystem)
            names = metadata.schema.to_arrow_schema().names
        except (OSError, pa.ArrowException) as error:
            yield _problem(name, state, f"not a Parquet file: {_first_line(error)}")
            continue
        missing = [
            each for each in (recipe.source.image_column, recipe.source.text_column) if each not in names
        ]
        if missing:
            has = ", ".join(names[:8])
            yield _problem(name, state, f'the column "{missing[0]}" is missing; the file has {has}')
            continue
        for group in range(metadata.num_row_groups):
            detail = {"path": info.path, "group": group, "state": state}
            yield Unit(f"{name}#{group:05d}", json.dumps(detail))


def read(unit: Unit, recipe: CurationRecipe) -> Iterator[Item]:
    source, detail = recipe.source, json.loads(unit.detail)
    if problem := detail.get("problem"):
        yield Item(unit.key, source.category, problem=problem)
        return
    try:
        file = pq.ParquetFile(detail["path"], filesystem=_store(recipe).filesystem)
        columns = [
            each
            for each in (
                source.image_column,
                source.text_column,
                source.audio_column,
                source.language_column,
                source.category_column,
                source.item_column,
            )
            if each in file.schema_arrow.names
        ]
        table = file.read_row_group(detail["group"], columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        yield Item(unit.key, source.category, problem=f"the row group is broken: {_first_line(error)}")
        return
    for number in range(len(table)):
        name = f"{unit.key}/{number:06d}"
        # text of the wrong encoding in a string column shows only when it is taken out
        row: dict[str, Any] = {}
        problems: dict[str, str] = {}
        for column in columns:
            try:
                row[column] = table[column][number].as_py()
            except (UnicodeDecodeError, pa.ArrowException) as error:
                row[column], problems[column] = None, f"the text is not UTF-8: {_first_line(error)}"
        yield _item(name, row, problems, recipe)


def _item(name: str, row: dict[str, Any], problems: dict[str, str], recipe: CurationRecipe) -> Item:
    source = recipe.source
    language = _word(row.get(source.language_column)) or source.language
    written = row.get(source.text_column)
    caption: tuple[Caption, ...] = ()
    if source.text_column in problems:
        caption = (Caption(language, None, problems[source.text_column]),)
    elif isinstance(written, bytes):
        try:
            caption = (Caption(language, text(written)),)
        except Unreadable as error:
            caption = (Caption(language, None, str(error)),)
    elif isinstance(written, str):
        caption = (Caption(language, written),)
    elif written is not None:
        caption = (Caption(language, None, f'the column "{source.text_column}" holds no text'),)
    image, image_problem = _bytes(row.get(source.image_column), source.image_column)
    sound, sound_problem = _bytes(row.get(source.audio_column), source.audio_column)
    clips: tuple[Clip, ...] = ()
    if recipe.clip.keep and (sound is not None or sound_problem is not None):
        clips = (Clip(language, sound, sound_problem),)
    return Item(
        _word(row.get(source.item_column)) or name,
        _word(row.get(source.category_column)) or source.category,
        image,
        caption,
        clips,
        image_problem=image_problem,
    )


def _word(value: Any) -> str:
    return "" if value is None else str(value)


def _bytes(value: Any, column: str) -> tuple[bytes | None, str | None]:
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None or isinstance(value, bytes):
        return value, None
    return None, f'the column "{column}" holds no bytes'


def _files(recipe: CurationRecipe) -> Iterator[fs.FileInfo]:
    store = _store(recipe)
    info = store.filesystem.get_file_info(store.path)
    if info.type == fs.FileType.NotFound:
        raise ValueError(f"there is no {recipe.source.path}: set source.path to a Parquet file or folder")
    if info.is_file:
        yield info
        return
    for each in store.filesystem.get_file_info(fs.FileSelector(store.path, recursive=True)):
        if each.is_file and each.extension == "parquet":
            yield each


def _store(recipe: CurationRecipe) -> Store:
    assert recipe.source.path is not None
    return Store.open(recipe.source.path)


def _problem(name: str, state: str, problem: str) -> Unit:
    return Unit(name, json.dumps({"problem": problem, "state": state}))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
