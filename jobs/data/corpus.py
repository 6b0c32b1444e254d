"""Text files, tokenised once into a memory-mapped file of bytes.

A token is a byte (vocabulary 256). Documents are ordered by a hash of their relative path, so that
any part of the corpus is a fair sample of it, and end with a zero byte. The file is written in a folder
of its own that is renamed when complete: workers that start together may all write, one wins,
and none ever sees half a corpus.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from runtime.settings import cache_folder

PYTHON_STDLIB = "python-stdlib"
"""The source that is there on every machine: the running interpreter's standard library."""

VOCABULARY = 256
_COMPRESSED = (".gz", ".dz")  # dictzip is gzip with an index that decompressors skip.
_SUFFIXES = (".txt", ".py", *_COMPRESSED)
_CHUNK = 1 << 20
_FORMAT = 1
# Tests are left out because many distributions ship the library without them.
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """``tokens`` (uint8, memory-mapped, read-only) of all documents one after the other.

    ``starts`` (int64, ascending) are the documents' first tokens. ``digest`` is the SHA-256 of the tokens:
    machines with the same digest train on the same data.
    """

    tokens: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    digest: str


def open_corpus(source: str, cache: str | Path | None = None) -> Corpus:
    """The corpus of ``source``, tokenised now if ``cache`` does not hold it yet.

    ``source`` is ``"python-stdlib"``, a file, or a folder of ``.txt``, ``.py``, ``.gz`` and
    ``.dz`` files, searched recursively. A change of any file's size or time makes a new corpus.
    Raises ValueError for a source that is missing, holds no text or is damaged.
    """
    root, files = _files(source)
    folder = Path(cache).expanduser() if cache is not None else cache_folder()
    destination = folder / f"corpus-{_key(root, files)}"
    if not destination.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write(source, root, files, destination)
    index = json.loads((destination / "index.json").read_text())
    return Corpus(
        tokens=np.memmap(destination / "tokens.bin", dtype=np.uint8, mode="r", shape=(index["tokens"],)),
        starts=np.asarray(index["starts"], dtype=np.int64),
        digest=index["digest"],
    )


def _files(source: str) -> tuple[Path, list[Path]]:
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = (
            path for path in root.rglob("*.py") if _STDLIB_LEFT_OUT.isdisjoint(path.relative_to(root).parts)
        )
        # Build settings differ from machine to machine even where the Python version is the same.
        files = [path for path in found if not path.name.startswith("_sysconfigdata")]
    else:
        root = Path(source).expanduser()
        if root.is_file():
            return root.parent, [root]
        if not root.is_dir():
            raise ValueError(
                f'the text source {source} does not exist: give a file, a folder or "{PYTHON_STDLIB}"'
            )
        files = [path for path in root.rglob("*") if path.suffix in _SUFFIXES and path.is_file()]
    if not files:
        raise ValueError(
            f"the text source {source} holds no text: put files ending in {', '.join(_SUFFIXES)} in it"
        )
    return root, sorted(files, key=lambda path: _name_hash(root, path))


def _name_hash(root: Path, path: Path) -> bytes:
    name = path.relative_to(root).as_posix()
    return hashlib.blake2b(os.fsencode(name), digest_size=16).digest()


def _key(root: Path, files: list[Path]) -> str:
    key = hashlib.blake2b(f"{_FORMAT}\n{sys.version_info[:3]}\n".encode(), digest_size=16)
    for path in files:
        status = path.stat()
        key.update(_name_hash(root, path) + os.fsencode(path.resolve()))
        key.update(f"\n{status.st_size} {status.st_mtime_ns}\n".encode())
    return key.hexdigest()


def _write(source: str, root: Path, files: list[Path], destination: Path) -> None:
    working = Path(tempfile.mkdtemp(prefix="writing-", dir=destination.parent))
    try:
        digest, starts, length = hashlib.sha256(), [], 0
        with (working / "tokens.bin").open("wb") as tokens:
            for path in files:
                document = 0
                for chunk in _contents(path):
                    if not document:
                        starts.append(length)
                    document += len(chunk)
                    digest.update(chunk)
                    tokens.write(chunk)
                if document:
                    digest.update(b"\0")
                    tokens.write(b"\0")
                    length += document + 1
        if not length:
            raise ValueError(f"the text source {source} is empty: give a source with text in it")
        index = {"source": source, "root": str(root), "tokens": length, "digest": digest.hexdigest()}
        (working / "index.json").write_text(json.dumps({**index, "starts": starts}))
        try:
            working.rename(destination)
        except OSError:
            # Somebody else was first. Anything but a complete corpus there is a real failure.
            if not (destination / "index.json").exists():
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _contents(path: Path) -> Iterator[bytes]:
    compressed = path.suffix in _COMPRESSED
    try:
        file: BinaryIO
        with gzip.open(path) if compressed else path.open("rb") as file:  # type: ignore[assignment]
            while chunk := file.read(_CHUNK):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): replace it or take it out of the source") from error
