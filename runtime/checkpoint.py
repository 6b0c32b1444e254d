"""Durable checkpoints on any pyarrow filesystem: a local path, ``s3://``, ``gs://``.

A checkpoint is a folder ``step-00000040`` with one safetensors file per owner and a
``manifest.json`` that is written last: without it the folder does not count. A file is written under
a temporary name and renamed, so that a name never stands for half a file; checksums in the
manifest find what rots or is cut afterwards. Files hold slices ``<block>.<start>.<stop>`` of shape
(3, n) (parameters, exp_avg, exp_avg_sq), so any other division of the model can read them.

The *version* of a checkpoint is the number of optimizer steps it has behind it.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from runtime.layout import Layout
from runtime.plan import WorkerId
from runtime.storage import Root, Store
from runtime.strict import STRICT, read_strictly

if TYPE_CHECKING:
    from pydantic import ConfigDict
    from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
ROWS = 3
"""Rows of a slice: parameters, exp_avg, exp_avg_sq."""

_CHUNK_BYTES = 8 << 20
_FOLDER_NAME = re.compile(r"step-(\d{8,})")

Interval = tuple[int, int, int]
"""(block, start, stop), in elements of the block."""


class CheckpointDamaged(Exception):
    """A checkpoint cannot be read as it was written; the text names the file and the cause."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One owner's file: its name in the checkpoint's folder, checksum, size and slices."""

    name: str
    sha256: str
    bytes: int
    pieces: tuple[Interval, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of. ``exponents`` are those of the exact sums, by tensor index.

    ``extra`` is the caller's (any JSON value).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: int = FORMAT
    version: int
    layout: str
    recipe: str
    exponents: tuple[int, ...] | None
    files: tuple[ShardFile, ...]
    extra: dict[str, Any]

    @property
    def folder(self) -> str:
        return folder_name(self.version)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def folder_name(version: int) -> str:
    return f"step-{version:08d}"


def layout_digest(layout: Layout) -> str:
    """The same for two models if their states are interchangeable: names, shapes and places."""
    text = json.dumps(
        [
            [block.name, block.size, [[t.index, t.name, list(t.shape), t.offset] for t in block.tensors]]
            for block in layout.blocks
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def write_shards(
    root: Root, version: int, worker: WorkerId, generation: int, pieces: Mapping[Interval, Tensor]
) -> ShardFile:
    """Writes one worker's slices, each (3, stop - start) float32 on any device.

    Streams slice by slice: nothing but one slice is ever copied. Raises OSError.
    """
    store, folder = Store.open(root), folder_name(version)
    name = f"worker-{worker}-g{generation}.safetensors"
    intervals = tuple(sorted(pieces))
    header = _safetensors_header(intervals)
    checksum, size = hashlib.sha256(header), len(header)
    with store.publish(folder, name) as stream:
        stream.write(header)
        for interval in intervals:
            piece = pieces[interval].detach().to("cpu").contiguous()
            _, start, stop = interval
            assert piece.shape == (ROWS, stop - start), f"{interval}: shape {tuple(piece.shape)}"
            values = piece.numpy()
            assert values.dtype == np.float32, f"{interval}: {values.dtype}"
            data = values.reshape(-1).view(np.uint8).data
            for at in range(0, len(data), _CHUNK_BYTES):
                chunk = data[at : at + _CHUNK_BYTES]
                checksum.update(chunk)
                stream.write(chunk)
            size += len(data)
    return ShardFile(name, checksum.hexdigest(), size, intervals)


def write_manifest(
    root: Root,
    version: int,
    layout: Layout,
    files: Iterable[ShardFile],
    *,
    exponents: Sequence[int] | None,
    recipe: str,
    extra: Mapping[str, Any] | None = None,
) -> Manifest:
    """Makes the checkpoint count. ``recipe`` is the recipe's digest.

    The files must hold every element of every block once. Raises ValueError if one of them cannot
    be seen from here (a folder that the machines do not share), and OSError.
    """
    store = Store.open(root)
    manifest = Manifest(
        version=version,
        layout=layout_digest(layout),
        recipe=recipe,
        exponents=None if exponents is None else tuple(exponents),
        files=tuple(sorted(files, key=lambda file: file.name)),
        extra=dict(extra or {}),
    )
    _assert_cover(layout, manifest.files)
    for file in manifest.files:
        if store.size(manifest.folder, file.name) != file.bytes:
            raise ValueError(
                f"{store.at(manifest.folder, file.name)} was written but cannot be seen by every worker: "
                f"set checkpoint.folder to a folder that all machines share"
            )
    body = asdict(manifest)
    text = json.dumps({"sha256": _digest_of(body), "manifest": body}, indent=1)
    with store.publish(manifest.folder, MANIFEST) as stream:
        stream.write(text.encode())
    return manifest


def list_checkpoints(root: Root) -> list[int]:
    """The versions, ascending, whose manifest is there. Nothing is verified."""
    store = Store.open(root)
    return [version for version in _folders(store) if store.size(folder_name(version), MANIFEST) is not None]


def newest_whole(root: Root, layout: Layout, *, read_back: bool = True) -> tuple[Manifest | None, list[str]]:
    """The newest checkpoint whose every file has its size and checksum, or None.

    ``read_back=False`` trusts the newest readable manifest: each file is verified when a
    ``CheckpointReader`` first needs it. The second value says in one sentence each why newer ones were
    passed over. Raises ValueError if that checkpoint was written by another model.
    """
    store = Store.open(root)
    problems: list[str] = []
    for version in reversed(_folders(store)):
        try:
            manifest = load_manifest(store, version)
            if manifest.layout != layout_digest(layout):
                raise ValueError(
                    f"{store.at(manifest.folder)} was written by another model (names, shapes or order of "
                    f"the parameters differ): resume with the model of its recipe or choose another folder"
                )
            if read_back:
                verify(store, manifest)
            return manifest, problems
        except CheckpointDamaged as error:
            problems.append(str(error))
    return None, problems


def load_manifest(root: Root, version: int) -> Manifest:
    """Raises CheckpointDamaged if the manifest is missing or is not what was written."""
    store = Store.open(root)
    path = store.at(folder_name(version), MANIFEST)
    try:
        with store.filesystem.open_input_stream(path) as stream:
            whole = json.loads(stream.read())
        if whole["sha256"] != _digest_of(whole["manifest"]):
            raise CheckpointDamaged(f"{path} does not match its checksum.")
        manifest = read_strictly(Manifest, whole["manifest"])
    except FileNotFoundError:
        raise CheckpointDamaged(f"{path} is missing: the checkpoint was not finished.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error}.") from error
    if manifest.format != FORMAT or manifest.version != version:
        raise CheckpointDamaged(f"{path} is of format {manifest.format}, version {manifest.version}.")
    return manifest


def verify(root: Root, manifest: Manifest) -> None:
    """Reads every file back. Raises CheckpointDamaged for the first that is not as it was written."""
    store = Store.open(root)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda file: _verify_file(store, manifest.folder, file), manifest.files):
            pass


def prune(root: Root, keep: int, *, read_back: bool = True) -> list[int]:
    """Deletes what is older than the newest ``keep`` checkpoints and what unfinished ones left.

    Counting starts at the newest whole checkpoint, found by reading it back before anything is
    deleted (``read_back=False`` spares that and trusts the newest readable manifest): it always
    stays. Folders newer than that one may still be in the making and are not touched. Returns the
    versions of the finished checkpoints that were deleted.
    """
    assert keep >= 1, keep
    store = Store.open(root)
    finished = list_checkpoints(store)
    whole: Manifest | None = None
    for version in reversed(finished):
        with suppress(CheckpointDamaged):
            candidate = load_manifest(store, version)
            if read_back:
                verify(store, candidate)
            whole = candidate
            break
    if whole is None:
        return []
    stay = [version for version in finished if version <= whole.version][-keep:]
    gone = [version for version in _folders(store) if version < whole.version and version not in stay]
    for version in gone:
        # The manifest goes first: a deletion cut short leaves a folder that does not count.
        with suppress(FileNotFoundError):
            store.filesystem.delete_file(store.at(folder_name(version), MANIFEST))
        store.filesystem.delete_dir(store.at(folder_name(version)))
    named = {MANIFEST, *(file.name for file in whole.files)}
    for info in store.children(whole.folder):
        if info.base_name not in named:
            store.filesystem.delete_file(info.path)
    return [version for version in gone if version in finished]


def discard_after(root: Root, version: int) -> list[int]:
    """Deletes everything newer than ``version``, finished or not, and returns the versions deleted.

    For a run that goes on from ``version`` because what came later is damaged: left there, it would
    count as the newest when older checkpoints are pruned.
    """
    store = Store.open(root)
    gone = [newer for newer in _folders(store) if newer > version]
    for newer in gone:
        store.filesystem.delete_dir(store.at(folder_name(newer)))
    return gone


class CheckpointReader:
    """Reads any slice of a checkpoint, however its files were cut. For one thread.

    A file is opened, and verified against its checksum, when a slice first needs it. ``check`` is called
    every few megabytes and may raise: reading all of a large model takes minutes.
    """

    def __init__(self, root: Root, manifest: Manifest, check: Callable[[], None] = lambda: None) -> None:
        self._store = Store.open(root)
        self._manifest = manifest
        self._check = check
        self._opened: dict[str, tuple[Any, dict[str, int]]] = {}

    def read_state(self, block: int, start: int, stop: int) -> Tensor:
        """The state (3, stop - start) of elements ``start`` to ``stop - 1``: rows parameters,
        exp_avg, exp_avg_sq, float32 on the CPU. Raises CheckpointDamaged.
        """
        state = np.empty((ROWS, stop - start), dtype=np.float32)
        filled = 0
        for file in self._manifest.files:
            for piece in file.pieces:
                lower, upper = max(start, piece[1]), min(stop, piece[2])
                if piece[0] == block and lower < upper:
                    handle, offsets = self._open(file)
                    width = 4 * (piece[2] - piece[1])
                    at = offsets[_piece_name(piece)] + 4 * (lower - piece[1])
                    for row in range(ROWS):
                        flat = state[row, lower - start : upper - start]
                        for begin in range(0, len(flat), _CHUNK_BYTES // 4):
                            self._check()
                            part = flat[begin : begin + _CHUNK_BYTES // 4]
                            data = handle.read_at(part.nbytes, at + row * width + 4 * begin)
                            part[:] = np.frombuffer(data, dtype="<f4")
                    filled += upper - lower
        assert filled == stop - start, f"block {block} has no elements {start} to {stop}"
        import torch  # the manifest's readers, such as a run's page, do without it

        return torch.from_numpy(state)

    def close(self) -> None:
        for handle, _ in self._opened.values():
            handle.close()
        self._opened.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, file: ShardFile) -> tuple[Any, dict[str, int]]:
        if file.name not in self._opened:
            folder = self._manifest.folder
            _verify_file(self._store, folder, file, self._check)
            handle = self._store.filesystem.open_input_file(self._store.at(folder, file.name))
            (length,) = struct.unpack("<Q", handle.read_at(8, 0))
            header = json.loads(handle.read_at(length, 8))
            offsets = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
            self._opened[file.name] = handle, offsets
        return self._opened[file.name]


def _piece_name(interval: Interval) -> str:
    return ".".join(map(str, interval))


def _safetensors_header(intervals: Sequence[Interval]) -> bytes:
    """Length, JSON and padding to 8 bytes, as the safetensors format has it."""
    entries, offset = {}, 0
    for block, start, stop in intervals:
        end = offset + 4 * ROWS * (stop - start)
        entries[_piece_name((block, start, stop))] = {
            "dtype": "F32",
            "shape": [ROWS, stop - start],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _assert_cover(layout: Layout, files: Iterable[ShardFile]) -> None:
    pieces = sorted(piece for file in files for piece in file.pieces)
    for block in layout.blocks:
        reached = 0
        for _, start, stop in (piece for piece in pieces if piece[0] == block.index):
            assert start == reached < stop, f"{block.name}: {start} follows {reached}"
            reached = stop
        assert reached == block.size, f"{block.name}: {reached} of {block.size} elements"


def _digest_of(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _folders(store: Store) -> list[int]:
    """The versions, ascending, that have a folder, finished or not."""
    matches = (_FOLDER_NAME.fullmatch(info.base_name) for info in store.children() if not info.is_file)
    return sorted(int(match[1]) for match in matches if match)


def _verify_file(
    store: Store, folder: str, file: ShardFile, check: Callable[[], None] = lambda: None
) -> None:
    path = store.at(folder, file.name)
    try:
        with store.filesystem.open_input_stream(path) as stream:
            checksum, size = hashlib.sha256(), 0
            while chunk := stream.read(_CHUNK_BYTES):
                check()
                checksum.update(chunk)
                size += len(chunk)
    except FileNotFoundError:
        raise CheckpointDamaged(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointDamaged(f"{path} cannot be read: {error}.") from error
    if size != file.bytes:
        raise CheckpointDamaged(f"{path} has {size} bytes instead of {file.bytes}.")
    if checksum.hexdigest() != file.sha256:
        raise CheckpointDamaged(f"{path} does not match its checksum.")
