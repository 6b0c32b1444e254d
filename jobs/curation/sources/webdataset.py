"""WebDataset: tar files in which neighbouring members with the same stem are one item.

``a.jpg`` with ``a.txt`` (or ``a.fr.txt``), ``a.ogg`` (or ``a.fr.ogg``) and ``a.json``, which may hold
"caption" or "text", "language" and "category".
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from jobs.curation.items import Caption, Clip, Item, Unit
from jobs.curation.recipe import CurationRecipe
from jobs.curation.sources.files import (
    IMAGE_SUFFIXES,
    MOST_FILE_BYTES,
    SOUND_SUFFIXES,
    Unreadable,
    first_folder,
    stamp,
    text,
    walk,
)

UNITS_PER_TASK = 1
_ENDINGS = (".tar", ".tar.gz", ".tgz")


def units(recipe: CurationRecipe) -> Iterator[Unit]:
    root = _root(recipe)
    if not root.exists():
        raise ValueError(f"there is no {root}: set source.path to a tar file or a folder of them")
    paths = [root] if root.is_file() else [path for path in walk(root) if path.name.endswith(_ENDINGS)]
    if not paths:
        raise ValueError(f"there is no .tar file in {root}: set source.path to a folder of tar files")
    for path in paths:
        name = path.name if path == root else path.relative_to(root).as_posix()
        yield Unit(name, stamp(path))


def read(unit: Unit, recipe: CurationRecipe) -> Iterator[Item]:
    """What a broken tar holds before its break is kept; the break itself is an item with a problem."""
    root = _root(recipe)
    members = _members(root if root.is_file() else root / unit.key)
    for stem, group in groupby(members, key=lambda member: member[0]):
        found = list(group)
        files = [(ending, data) for _, ending, data, problem in found if problem is None]
        if files:
            yield _item(f"{unit.key}/{stem}", stem, files, recipe)
        for _, _, _, problem in found:
            if problem is not None:
                yield Item(f"{unit.key}/{stem}", recipe.source.category, problem=problem)


def _root(recipe: CurationRecipe) -> Path:
    assert recipe.source.path is not None
    return Path(recipe.source.path).expanduser()


def _members(path: Path) -> Iterator[tuple[str, str, bytes, str | None]]:
    """(stem, ending, content, problem) of every file in the tar, read once from front to back."""
    try:
        with (
            _open(path) as file,
            tarfile.open(fileobj=cast(BinaryIO, tail := _Tail(file)), mode="r|") as tar,
        ):
            for member in tar:
                name = PurePosixPath(member.name)
                base, dot, ending = name.name.partition(".")
                stem = (name.parent / base).as_posix()
                if not member.isfile() or not base or not dot:
                    continue
                if member.size > MOST_FILE_BYTES:
                    yield stem, ending, b"", f"a member has more than {MOST_FILE_BYTES:,} bytes"
                    continue
                content = tar.extractfile(member)
                assert content is not None
                yield stem, ending.lower(), content.read(), None
            if not tail.ended():
                yield "(broken)", "", b"", "the tar is cut off: its end is missing"
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        yield "(broken)", "", b"", f"the tar is broken from here on: {str(error) or type(error).__name__}"


def _open(path: Path) -> BinaryIO:
    """Decompressed. Unlike tarfile's own readers, these notice where a compressed file is cut off."""
    with path.open("rb") as file:
        magic = file.read(6)
    for mark, reader in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open)):
        if magic.startswith(mark):
            return cast(BinaryIO, reader(path, "rb"))
    return path.open("rb")


class _Tail:
    """A file that remembers the last block read: a whole tar's is one of zeros."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._last = b""

    def read(self, size: int) -> bytes:
        read = self._file.read(size)
        self._last = (self._last + read)[-tarfile.BLOCKSIZE :]
        return read

    def ended(self) -> bool:
        """Reads what is left to see it."""
        while self.read(1 << 20):
            pass
        return self._last == bytes(tarfile.BLOCKSIZE)


def _item(name: str, stem: str, files: list[tuple[str, bytes]], recipe: CurationRecipe) -> Item:
    source = recipe.source
    image, problem = None, None
    about: dict[str, Any] = {}
    captions: list[Caption] = []
    clips: list[Clip] = []
    for ending, data in files:
        if ending == "json":
            try:
                parsed = json.loads(text(data))
                about = parsed if isinstance(parsed, dict) else {}
            except (Unreadable, ValueError, RecursionError) as error:
                problem = f"the .json is broken: {error}"
    language = _word(about.get("language")) or source.language
    for ending, data in files:
        code, _, last = ending.rpartition(".")
        if f".{last}" in IMAGE_SUFFIXES and image is None:
            image = data
        elif last in ("txt", "caption"):
            try:
                captions.append(Caption(code or language, text(data)))
            except Unreadable as error:
                captions.append(Caption(code or language, None, str(error)))
        elif f".{last}" in SOUND_SUFFIXES and recipe.clip.keep:
            clips.append(Clip(code or language, data))
    written = _word(about.get("caption")) or _word(about.get("text"))
    if written and not captions:
        captions.append(Caption(language, written))
    if problem is not None and not captions:
        captions.append(Caption(language, None, problem))
    category = _word(about.get("category")) or first_folder(stem, source.category)
    return Item(name, category, image, tuple(captions), tuple(clips))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""
