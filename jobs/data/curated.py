"""A curated set: tokenised captions with their images and sounds, in Parquet files beside a manifest.

``manifest.json`` names the files of every split in order; row i of a split is row i of these files one after
the other. A row is one item in one language, with that language's clip where there is one.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.data.tokenizer import CaptionTokenizer
from runtime.storage import Root, Store

MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"

_REQUESTS = 16
"""To an object store at once, for one read: a row group there takes longer to ask for than to send."""

_ITEMS_OF_A_KIND = 4
"""Fewer teach nothing that the next one would show."""

SCHEMA = pa.schema(
    [
        pa.field("sample", pa.string(), nullable=False),
        pa.field("item", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("language", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("image", pa.binary()),
        pa.field("audio", pa.binary()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)
"""``sample`` is unique; ``image`` is a PNG of image_size x image_size, ``audio`` int16 little-endian mono PCM
at audio_rate Hz; ``width`` and ``height`` are the original image's, 0 without one."""

_Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataFile(_Part):
    """``bytes`` and ``sha256`` are of the file as it lies there."""

    name: str
    rows: _Count
    bytes: _Count
    sha256: str


class Column(_Part):
    name: str
    type: str
    nullable: bool


class Drop(_Part):
    """How many rows (or, where ``what`` says so, clips) a filter took out, and what for."""

    filter: str
    reason: str
    what: Literal["rows", "clips"]
    count: _Count
    examples: tuple[str, ...] = ()


class Manifest(_Part):
    """``image_size`` in pixels, ``audio_rate`` in Hz (None: the set has no sound); ``read`` is the number of
    rows that the source gave; ``digest`` is of recipe and source, and equal for equal sets."""

    format: Literal[1] = 1
    name: str
    digest: str
    image_size: int
    audio_rate: int | None
    columns: tuple[Column, ...]
    splits: dict[str, tuple[DataFile, ...]]
    tokenizer_sha256: str
    vocabulary: int
    read: _Count
    categories: dict[str, dict[str, int]]
    languages: dict[str, dict[str, int]]
    clips: dict[str, int]
    drops: tuple[Drop, ...]
    source: dict[str, Any]
    recipe: dict[str, Any]

    def rows(self, split: str) -> int:
        return sum(file.rows for file in self.splits[split])


class CuratedSet:
    """A set on any pyarrow filesystem. Picklable (as its address), and free to share between threads."""

    def __init__(self, root: Root) -> None:
        self._store = Store.open(root)
        self.manifest = _manifest(self._store)
        text = _content(self._store, TOKENIZER)
        if hashlib.sha256(text).hexdigest() != self.manifest.tokenizer_sha256:
            raise ValueError(
                f"{self._store.at(TOKENIZER)} is not what the manifest names: curate the set again"
            )
        self.tokenizer = CaptionTokenizer.from_json(text.decode())
        self._ends = {
            split: list(itertools.accumulate(file.rows for file in files))
            for split, files in self.manifest.splits.items()
        }
        self._metadata: dict[str, pq.FileMetaData] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest.splits)

    @property
    def digest(self) -> str:
        """Changes with any bit of the set."""
        return hashlib.sha256(self.manifest.model_dump_json().encode()).hexdigest()

    def kinds(self) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
        """What the training pictures are of: (the names of all kinds in order, the number of each training
        row's). A kind is a folder, up to two deep, that the names of enough items begin with; the others are
        of their category's."""
        table = self.table("train", ["item", "category"]).to_pydict()
        categories = dict(zip(table["item"], table["category"], strict=True))
        folders = {item: "/".join(item.split("/")[:-1][:2]) for item in categories}
        sizes = Counter(folders.values())
        kind_of = {
            item: folder if folder and sizes[folder] >= _ITEMS_OF_A_KIND else categories[item]
            for item, folder in folders.items()
        }
        kinds = tuple(sorted(set(kind_of.values())))
        numbers = {kind: number for number, kind in enumerate(kinds)}
        return kinds, np.array([numbers[kind_of[item]] for item in table["item"]], dtype=np.int64)

    def rows(self, split: str) -> int:
        """Raises ValueError for a split that the set does not have."""
        return sum(file.rows for file in self._files(split))

    def table(self, split: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a split, in order; of ``columns`` only, if given."""
        schema = _chosen(columns)
        parts = [
            self._open(file).read(columns=schema.names, use_threads=False).cast(schema)
            for file in self._files(split)
        ]
        return pa.concat_tables(parts) if parts else schema.empty_table()

    def read(self, split: str, indices: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """The rows at ``indices``, in that order, repeated where an index is; only their row groups are read,
        several at once where each is a request over a network.

        Raises ValueError for an index that the split does not have.
        """
        schema, files = _chosen(columns), self._files(split)
        ends = self._ends[split]
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for place, index in enumerate(indices):
            if not 0 <= index < (ends[-1] if ends else 0):
                raise ValueError(f"the split {split} has {ends[-1] if ends else 0} rows, so none at {index}")
            number = bisect.bisect_right(ends, index)
            within = int(index) - (ends[number - 1] if number else 0)
            group, row = _row_group(self._file_metadata(files[number]), within)
            wanted.setdefault((number, group), []).append((place, row))
        if not wanted:
            return schema.empty_table()
        ordered = sorted(wanted.items())

        def rows_of(one: tuple[tuple[int, int], list[tuple[int, int]]]) -> pa.Table:
            (number, group), rows = one
            read = self._open(files[number]).read_row_group(group, columns=schema.names, use_threads=False)
            return read.take(pa.array([row for _, row in rows], pa.int64())).cast(schema)

        if self._store.is_local or len(ordered) == 1:
            parts = [rows_of(one) for one in ordered]
        else:
            with ThreadPoolExecutor(min(len(ordered), _REQUESTS)) as pool:
                parts = list(pool.map(rows_of, ordered))
        places = [place for _, rows in ordered for place, _ in rows]
        return pa.concat_tables(parts).take(pa.array(np.argsort(np.asarray(places))))

    def check(self) -> None:
        """Reads every file. Raises ValueError for one that is missing or not what the manifest names."""
        for files in self.manifest.splits.values():
            for file in files:
                if hashlib.sha256(_content(self._store, file.name)).hexdigest() != file.sha256:
                    raise ValueError(
                        f"{self._store.at(file.name)} is not what the manifest names: curate the set again"
                    )

    def _files(self, split: str) -> tuple[DataFile, ...]:
        try:
            return self.manifest.splits[split]
        except KeyError:
            raise ValueError(f'the set has no split "{split}": choose {", ".join(self.splits)}') from None

    def _open(self, file: DataFile) -> pq.ParquetFile:
        return pq.ParquetFile(
            self._store.at(file.name), filesystem=self._store.filesystem, metadata=self._file_metadata(file)
        )

    def _file_metadata(self, file: DataFile) -> pq.FileMetaData:
        if file.name not in self._metadata:
            try:
                self._metadata[file.name] = pq.read_metadata(
                    self._store.at(file.name), filesystem=self._store.filesystem
                )
            except (OSError, pa.ArrowInvalid) as error:
                raise ValueError(
                    f"{self._store.at(file.name)} cannot be read ({error}): curate the set again"
                ) from None
        return self._metadata[file.name]

    def __reduce__(self) -> tuple[Any, ...]:
        return CuratedSet, (self._store,)


def open_set(root: Root) -> CuratedSet:
    """The curated set in a folder: a path or the URI of any pyarrow filesystem. Raises ValueError if there is
    none, or one of another format."""
    return CuratedSet(root)


def _manifest(store: Store) -> Manifest:
    try:
        return Manifest.model_validate_json(_content(store, MANIFEST))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(
            f"{store.at(MANIFEST)} is no manifest of format 1 "
            f"({'.'.join(map(str, first['loc']))}: {first['msg']}): curate the set again"
        ) from None


def _content(store: Store, name: str) -> bytes:
    try:
        with store.filesystem.open_input_stream(store.at(name)) as stream:
            content: bytes = stream.read()
            return content
    except FileNotFoundError:
        raise ValueError(
            f"there is no {name} in {store.path}: give a curated set's folder, or make one by reknit curate"
        ) from None


def _chosen(columns: Sequence[str] | None) -> pa.Schema:
    if columns is None:
        return SCHEMA
    unknown = [name for name in columns if name not in SCHEMA.names]
    if unknown:
        raise ValueError(f'a curated set has no column "{unknown[0]}": choose from {", ".join(SCHEMA.names)}')
    return pa.schema([SCHEMA.field(name) for name in columns])


def _row_group(metadata: pq.FileMetaData, row: int) -> tuple[int, int]:
    """(row group, row in it) of a file's row."""
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < rows:
            return group, row
        row -= rows
    raise AssertionError("the manifest counts more rows than the file has")
