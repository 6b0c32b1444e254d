"""What sources that read files have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from jobs.curation.items import Caption, Clip

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".svg")
SOUND_SUFFIXES = (".ogg", ".wav", ".flac")

MOST_FILE_BYTES = 256_000_000
"""A larger file is no picture, caption or clip."""


class Unreadable(Exception):
    """A file that cannot be read; the reason in a few words, without its path."""


def folder(path: str, remedy: str) -> Path:
    """Raises ValueError with the ``remedy`` if it is none."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"there is no folder {path}: {remedy}")
    return root


def walk(root: Path) -> Iterator[Path]:
    """Every file below, in order of their paths; links to folders are not followed, so no loop is endless."""
    for place, folders, names in os.walk(root, followlinks=False):
        folders.sort()
        for name in sorted(names):
            yield Path(place, name)


def stamp(path: Path) -> str:
    """Changes when the file does; "" if there is none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def content(path: Path) -> bytes:
    """Raises Unreadable."""
    try:
        if path.stat().st_size > MOST_FILE_BYTES:
            raise Unreadable(f"the file has more than {MOST_FILE_BYTES:,} bytes")
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(f"the file cannot be read: {error.strerror or error}") from None


def text(data: bytes) -> str:
    """UTF-8, or UTF-16 with its mark. Raises Unreadable."""
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"the text is not UTF-8: byte {error.start}") from None


def caption_file(path: Path, language: str) -> Caption:
    """The whole file as one caption."""
    try:
        return Caption(language, text(content(path)))
    except Unreadable as error:
        return Caption(language, None, str(error))


def clip_file(path: Path, language: str) -> Clip:
    try:
        return Clip(language, content(path))
    except Unreadable as error:
        return Clip(language, None, str(error))


def first_folder(name: str, default: str) -> str:
    """The category of an item that is named by its path: the folder at the top."""
    top, slash, _ = name.partition("/")
    return top if slash else default
