"""Small sources of raw items: written, read, and what becomes of every item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.curation.examine import examine_table
from jobs.curation.items import Item, item_table
from jobs.curation.recipe import CurationRecipe
from jobs.curation.sources import list_units, read_unit
from tests.support.media import picture_file, sound_file, tone

PNG, WAV = picture_file(1), sound_file(tone(440))


def recipe(kind: str, path: Path, **sections: Any) -> CurationRecipe:
    source = {"kind": kind, "path": str(path), **sections.pop("source", {})}
    return CurationRecipe.model_validate(
        {"set": {"name": "toy", "folder": "toy", "image_size": 16}, "source": source, **sections}
    )


def items(settings: CurationRecipe) -> dict[str, Item]:
    found = [item for unit in list_units(settings) for item in read_unit(unit, settings)]
    assert len({item.name for item in found}) == len(found)
    return {item.name: item for item in found}


def fates(settings: CurationRecipe) -> dict[str, tuple[str, str] | None]:
    """Of every item (and "item:language", where captions differ): the filter and reason, None if kept."""
    found: dict[str, tuple[str, str] | None] = {}
    for unit in list_units(settings):
        for number, item in enumerate(read_unit(unit, settings)):
            row = examine_table(item_table(unit.key, number, True, item), settings).to_pylist()[0]
            if row["problem"] is not None:
                found[row["name"]] = ("reading", row["problem"])
            elif not row["captions"]:
                found[row["name"]] = ("caption", "")
            for caption in row["captions"]:
                drop = row["image_drop"] or (caption if caption["filter"] else None)
                name = row["name"] if caption["language"] == "en" else f"{row['name']}:{caption['language']}"
                found[name] = (drop["filter"], drop["reason"]) if drop else None
            for clip in row["clips"]:
                found[f"{row['name']} clip"] = (clip["filter"], clip["reason"]) if clip["filter"] else None
    return found


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder
