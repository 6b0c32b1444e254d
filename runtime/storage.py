"""A folder on any pyarrow filesystem, in which files appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

_OBJECT_STORES = ("s3", "gcs", "abfs")


@dataclass(frozen=True)
class Store:
    """A folder on a pyarrow filesystem. Picklable, and free to share between threads."""

    filesystem: fs.FileSystem
    path: str

    @classmethod
    def open(cls, root: Root) -> Store:
        """A path, a URI, or a store as it is. Raises ValueError for a URI that has no filesystem.

        A URI's parameters are pyarrow's (``s3://bucket/run?endpoint_override=localhost:9000&scheme=http``).
        Credentials are found by every process for itself, where the store's own tools look for them.
        """
        if isinstance(root, Store):
            return root
        if "://" not in str(root):
            return cls(fs.LocalFileSystem(), str(Path(root).expanduser().absolute()))
        try:
            filesystem, path = fs.FileSystem.from_uri(str(root))
        except ValueError as error:
            raise ValueError(
                f"{root} is no checkpoint folder: give a local path or an s3:// or gs:// address ({error})"
            ) from error
        return cls(filesystem, path.rstrip("/"))

    def at(self, *parts: str) -> str:
        return "/".join((self.path, *parts))

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def children(self, *parts: str) -> list[fs.FileInfo]:
        """What lies directly in a folder, by name; nothing if there is no such folder."""
        found = self.filesystem.get_file_info(fs.FileSelector(self.at(*parts), allow_not_found=True))
        return sorted(found, key=lambda info: str(info.base_name))

    def size(self, *parts: str) -> int | None:
        """Bytes of a file, or None if there is no such file."""
        info = self.filesystem.get_file_info(self.at(*parts))
        return int(info.size) if info.is_file else None

    def sync(self, *parts: str) -> None:
        """Forces a local file or folder to disk; other filesystems do so by themselves."""
        if not self.is_local:
            return
        descriptor = os.open(self.at(*parts), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def publish(self, folder: str, name: str) -> Iterator[Any]:
        """An output stream whose content appears under ``name`` when all of it is there.

        An object store shows an object only when its upload is complete, and renaming there is a
        copy (of at most 5 GB on S3), so objects are written under their final name. A stream there
        completes its upload even when it is left by an exception; what it then shows is deleted.
        """
        base = self.filesystem
        while isinstance(base, fs.SubTreeFileSystem):
            base = base.base_fs
        in_place = base.type_name in _OBJECT_STORES
        written = name if in_place else f".{name}.{uuid.uuid4().hex[:8]}.tmp"
        self.filesystem.create_dir(self.at(folder), recursive=True)
        try:
            with self.filesystem.open_output_stream(self.at(folder, written)) as stream:
                yield stream
            if not in_place:
                self.sync(folder, written)
                self.filesystem.move(self.at(folder, written), self.at(folder, name))
                self.sync(folder)
                self.sync()
        except BaseException:
            with suppress(OSError):
                self.filesystem.delete_file(self.at(folder, written))
            raise


Root = str | Path | Store
"""Where checkpoints lie: what ``Store.open`` accepts."""
