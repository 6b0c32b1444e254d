"""A folder of images: captions in .txt files of the same names, or in one csv or jsonl file.

A folder directly below the root is the category of what is in it. A clip is a sound file of the same name.
``a.fr.txt`` and ``a.fr.ogg`` are in French.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.curation.items import Caption, Item, Unit
from jobs.curation.recipe import CurationRecipe
from jobs.curation.sources.files import (
    IMAGE_SUFFIXES,
    SOUND_SUFFIXES,
    Unreadable,
    caption_file,
    clip_file,
    content,
    first_folder,
    folder,
    stamp,
    text,
    walk,
)

UNITS_PER_TASK = 16


def units(recipe: CurationRecipe) -> Iterator[Unit]:
    """Every unit knows the files that it is made of, so that reading lists no folder again."""
    assert recipe.source.path is not None
    root = folder(recipe.source.path, "set source.path to a folder of images")
    if recipe.source.captions is not None:
        yield from _table_units(root, recipe)
        return
    images: dict[str, str] = {}
    beside: dict[str, list[str]] = {}
    for path in walk(root):
        name = path.relative_to(root).as_posix()
        stem = name.removesuffix(path.suffix)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            # two images of one name are two items
            images[stem if stem not in images else name] = name
        elif path.suffix.lower() in (".txt", *SOUND_SUFFIXES):
            beside.setdefault(stem, []).append(name)
            bare, dot, language = stem.rpartition(".")
            if dot and "/" not in language:
                beside.setdefault(bare, []).append(name)
    if not images:
        raise ValueError(f"there are no images in {root}: set source.path to a folder of images")
    for key, image in images.items():
        files = sorted(beside.get(image.removesuffix(Path(image).suffix), []))
        stamps = [stamp(root / each) for each in (image, *files)]
        yield Unit(key, json.dumps({"image": image, "files": files, "stamps": stamps}))


def read(unit: Unit, recipe: CurationRecipe) -> Iterator[Item]:
    source = recipe.source
    assert source.path is not None
    root, detail = Path(source.path).expanduser(), json.loads(unit.detail)
    if problem := detail.get("problem"):
        yield Item(unit.key, source.category, problem=problem)
        return
    image, image_problem = None, None
    try:
        image = content(root / detail["image"])
    except Unreadable as error:
        image_problem = str(error)
    category = detail.get("category") or first_folder(detail["image"], source.category)
    captions = [Caption(**each) for each in detail.get("captions", ())]
    clips = [clip_file(root / each["file"], each["language"]) for each in detail.get("sounds", ())]
    stem = detail["image"].removesuffix(Path(detail["image"]).suffix)
    for file in detail.get("files", ()):
        path = root / file
        language = file.removesuffix(path.suffix)[len(stem) :].lstrip(".") or source.language
        if path.suffix.lower() == ".txt":
            captions.append(caption_file(path, language))
        else:
            clips.append(clip_file(path, language))
    yield Item(
        unit.key,
        category,
        image,
        tuple(captions),
        tuple(clips) if recipe.clip.keep else (),
        image_problem=image_problem,
    )


def _table_units(root: Path, recipe: CurationRecipe) -> Iterator[Unit]:
    """One for every image that the captions file names, and one for every row of it that is no use."""
    source = recipe.source
    assert source.captions is not None
    path = root / Path(source.captions).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no captions file {path}: set source.captions to a csv or jsonl file")
    reader = {".csv": _csv_rows, ".jsonl": _json_rows}.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path.name} is neither .csv nor .jsonl: set source.captions to one of these")
    images: dict[str, dict[str, Any]] = {}
    count = 0
    for number, row, problem in reader(path):
        count += 1
        where = f"{path.name}:{number}"
        if problem is None:
            problem = _row_problem(row, root, recipe)
        if problem is not None:
            yield Unit(where, json.dumps({"problem": problem}))
            continue
        file, language = row[source.image_column], row.get(source.language_column) or source.language
        item = images.setdefault(
            row.get(source.item_column) or file,
            {
                "image": file,
                "category": row.get(source.category_column),
                "captions": [],
                "sounds": [],
                "stamp": stamp(root / file),
            },
        )
        item["captions"].append({"language": language, "text": row[source.text_column]})
        if sound := row.get(source.audio_column):
            item["sounds"].append({"language": language, "file": sound, "stamp": stamp(root / sound)})
    if not count:
        raise ValueError(f"{path.name} has no rows: set source.captions to a file with captions in it")
    for name, item in images.items():
        yield Unit(name, json.dumps(item))


def _row_problem(row: Any, root: Path, recipe: CurationRecipe) -> str | None:
    source = recipe.source
    if not isinstance(row, dict):
        return "the row is no table of columns"
    for column in (source.image_column, source.text_column):
        if not isinstance(row.get(column), str):
            return f'the column "{column}" is missing'
    for column in (source.language_column, source.category_column, source.item_column, source.audio_column):
        if not isinstance(row.get(column, ""), str | None):
            return f'the column "{column}" is no text'
    for column in (source.image_column, source.audio_column):
        file = row.get(column)
        if file and not (root / file).resolve().is_relative_to(root.resolve()):
            return f'the column "{column}" names a file outside the folder'
    return None


def _csv_rows(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """(line, row, problem). Lines are decoded one by one: a wrong byte costs its row."""
    lines = content_lines(path)
    header: list[str] | None = None
    for number, line, problem in lines:
        if problem is not None:
            yield number, None, problem
            continue
        try:
            cells = next(csv.reader(io.StringIO(line), strict=True), [])
        except csv.Error as error:
            yield number, None, f"not a row of csv: {error}"
            continue
        if header is None:
            header = cells
        elif len(cells) != len(header):
            yield number, None, f"the row has {len(cells)} cells, the header {len(header)}"
        else:
            yield number, dict(zip(header, cells, strict=True)), None


def _json_rows(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    for number, line, problem in content_lines(path):
        if problem is not None:
            yield number, None, problem
            continue
        try:
            yield number, json.loads(line), None
        except (ValueError, RecursionError) as error:
            yield number, None, f"not a line of JSON: {error}"


def content_lines(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line number from 1, text, problem) of every line that is not blank."""
    try:
        data = content(path)
    except Unreadable as error:
        raise ValueError(f"{path}: {error}") from None
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, text(line), None
        except Unreadable as error:
            yield number, "", str(error)
