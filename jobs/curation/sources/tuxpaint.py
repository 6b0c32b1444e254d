"""The stamps of Tux Paint: pictures with captions in up to 78 languages, many of them spoken.

``X.txt`` holds the English caption, then lines such as ``fr.utf8=...``; beside it lie ``X.png`` or ``X.svg``,
and the spoken captions ``X_desc.ogg`` (English) and ``X_desc_fr.ogg``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from jobs.curation.items import Caption, Clip, Item, Unit
from jobs.curation.recipe import CurationRecipe
from jobs.curation.sources.files import (
    Unreadable,
    clip_file,
    content,
    first_folder,
    folder,
    stamp,
    text,
    walk,
)

UNITS_PER_TASK = 16
STAMPS = "/usr/share/tuxpaint/stamps"
PACKAGE = "tuxpaint-stamps-default"
_ENGLISH = "en"


def units(recipe: CurationRecipe) -> Iterator[Unit]:
    remedy = (
        f"install Tux Paint's stamps, the Debian package {PACKAGE} (apt install {PACKAGE}), or set "
        "source.path to where they are"
    )
    root = folder(recipe.source.path or STAMPS, remedy)
    beside: dict[Path, list[Path]] = {}
    for path in walk(root):
        beside.setdefault(path.parent, []).append(path)
    found = False
    for paths in beside.values():
        for path in paths:
            if path.suffix == ".txt":
                found = True
                near = [each for each in paths if each.name.startswith(path.stem)]
                states = "\n".join(f"{each.name} {stamp(each)}" for each in near)
                name = path.relative_to(root).with_suffix("").as_posix()
                yield Unit(name, hashlib.sha256(states.encode(errors="surrogateescape")).hexdigest())
    if not found:
        raise ValueError(f"there are no stamps in {root}: {remedy}")


def read(unit: Unit, recipe: CurationRecipe) -> Iterator[Item]:
    root = Path(recipe.source.path or STAMPS).expanduser()
    base = root / unit.key
    category = first_folder(unit.key, recipe.source.category)
    try:
        captions = tuple(_captions(content(_with(base, ".txt"))))
    except Unreadable as error:
        yield Item(unit.key, category, problem=str(error))
        return
    image, problem = _image(base)
    clips: tuple[Clip, ...] = ()
    if recipe.clip.keep:
        wanted = recipe.caption.languages or tuple(each.language for each in captions)
        clips = tuple(
            clip_file(path, language)
            for language in dict.fromkeys(wanted)
            if (path := _with(base, f"_desc{'' if language == _ENGLISH else f'_{language}'}.ogg")).exists()
        )
    yield Item(unit.key, category, image, captions, clips, image_problem=problem)


def _with(base: Path, ending: str) -> Path:
    # not with_suffix: names such as "1.5" hold a dot of their own
    return base.parent / f"{base.name}{ending}"


def _captions(data: bytes) -> Iterator[Caption]:
    """A line in another encoding costs that line's caption only."""
    for number, line in enumerate(data.splitlines()):
        code, equals, rest = line.partition(b".utf8=")
        translated = bool(equals) and code.replace(b"@", b"").replace(b"_", b"").isalnum()
        if number and not translated:
            continue
        language = code.decode("ascii", "replace") if translated else _ENGLISH
        try:
            yield Caption(language, text(rest if translated else line))
        except Unreadable as error:
            yield Caption(language, None, str(error))


def _image(base: Path) -> tuple[bytes | None, str | None]:
    for suffix in (".png", ".svg"):
        path = _with(base, suffix)
        if path.exists():
            try:
                return content(path), None
            except Unreadable as error:
                return None, str(error)
    return None, None
