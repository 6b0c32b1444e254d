"""What a curation has done so far, kept beside the set, so that an interrupted one goes on.

The folder's name is made of the recipe and the state of the source: another recipe, or a changed source,
finds nothing of it. Files appear whole or not at all (``runtime.storage``).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.curation.items import SIGNALS, Seen, Unit, seen_of
from jobs.curation.recipe import CurationRecipe
from jobs.data.curated import DataFile
from runtime.storage import Store

_FORMAT = 1
_PREFIX = ".work-"
_DONE = ".curated"
_ROWS_PER_GROUP = 8


def work_key(recipe: CurationRecipe, units: Sequence[Unit]) -> str:
    """16 hex digits that change with whatever changes the set."""
    parts = [_FORMAT, recipe_values(recipe), [(unit.key, unit.detail) for unit in units]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def recipe_values(recipe: CurationRecipe) -> dict[str, Any]:
    """The recipe without what does not change the set's content: where it goes."""
    return recipe.model_dump(mode="json", exclude={"set": {"folder"}})


@dataclass(frozen=True)
class Work:
    """The work on the set in ``store``'s folder. Picklable."""

    store: Store
    key: str

    @property
    def folder(self) -> str:
        return f"{_PREFIX}{self.key}"

    def keep(self, examined: pa.Table) -> None:
        """Writes a table of EXAMINED under a name made of its places: the same ones replace themselves."""
        places = [examined[name].to_pylist() for name in ("unit", "number")]
        name = hashlib.sha256(json.dumps(places).encode()).hexdigest()[:24]
        buffer = io.BytesIO()
        pq.write_table(examined, buffer, row_group_size=_ROWS_PER_GROUP, compression="lz4")
        self._write(f"examined-{name}.parquet", buffer.getvalue())

    def finished_units(self) -> set[str]:
        """The keys of units of which every item has been kept."""
        numbers: dict[str, set[int]] = {}
        ends: dict[str, int] = {}
        for _, table in self._tables(("unit", "number", "last")):
            for row in table.to_pylist():
                numbers.setdefault(row["unit"], set()).add(row["number"])
                if row["last"]:
                    ends[row["unit"]] = row["number"]
        return {unit for unit, last in ends.items() if len(numbers[unit]) == last + 1}

    def seen(self, units: Iterable[str]) -> list[Seen]:
        """The signals of every item of ``units``, once each."""
        wanted = set(units)
        found: dict[tuple[str, int], Seen] = {}
        for file, table in self._tables(SIGNALS):
            for seen in seen_of(table, file):
                if seen.unit in wanted:
                    found.setdefault((seen.unit, seen.number), seen)
        return [found[place] for place in sorted(found)]

    def payload(
        self, places: Iterable[tuple[str, int]], columns: Sequence[str]
    ) -> dict[tuple[str, int], Any]:
        """``columns`` of the rows at (file, row); only their row groups are read."""
        wanted: dict[str, dict[int, list[int]]] = {}
        for file, row in sorted(set(places)):
            wanted.setdefault(file, {}).setdefault(row // _ROWS_PER_GROUP, []).append(row)
        found = {}
        for file, groups in wanted.items():
            opened = pq.ParquetFile(self.store.at(self.folder, file), filesystem=self.store.filesystem)
            for group, rows in groups.items():
                table = opened.read_row_group(group, columns=list(columns), use_threads=False)
                for row in rows:
                    found[file, row] = table.slice(row - group * _ROWS_PER_GROUP, 1).to_pylist()[0]
        return found

    def record(self, file: DataFile) -> None:
        """Remembers a shard that has been written."""
        self._write(f"{file.name}.json", file.model_dump_json().encode())

    def recorded(self, name: str) -> DataFile | None:
        """The shard of that name, if it has been written and is still there."""
        try:
            content = self._read(f"{name}.json")
        except FileNotFoundError:
            return None
        file = DataFile.model_validate_json(content)
        return file if self.store.size(name) == file.bytes else None

    def done(self) -> bool:
        """Whether the set in the folder is the one that this work leads to, and whole."""
        try:
            with self.store.filesystem.open_input_stream(self.store.at(_DONE)) as stream:
                return bool(stream.read().decode() == self.key)
        except FileNotFoundError:
            return False

    def publish(self, name: str, content: bytes) -> None:
        """Writes a file of the set."""
        # named from the folder above: on an object store "set//name" would be another place than "set/name"
        above, _, folder = self.store.path.rpartition("/")
        with Store(self.store.filesystem, above).publish(folder, name) as stream:
            stream.write(content)

    def begin(self) -> None:
        """From here on the folder holds no finished set."""
        for name in (_DONE, "manifest.json"):
            if self.store.size(name) is not None:
                self.store.filesystem.delete_file(self.store.at(name))

    def finish(self, names: Iterable[str]) -> None:
        """Only the files ``names`` of the set stay, and no work on it."""
        self.publish(_DONE, self.key.encode())
        kept = {*names, _DONE}
        for info in self.store.children():
            name = info.base_name
            if name.startswith(_PREFIX):
                self.store.filesystem.delete_dir(info.path)
            elif info.is_file and name.endswith(".parquet") and "-of-" in name and name not in kept:
                self.store.filesystem.delete_file(info.path)

    def _tables(self, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        for info in self.store.children(self.folder):
            name = info.base_name
            if name.startswith("examined-"):
                with self.store.filesystem.open_input_file(info.path) as file:
                    yield name, pq.read_table(file, columns=list(columns), use_threads=False)

    def _write(self, name: str, content: bytes) -> None:
        with self.store.publish(self.folder, name) as stream:
            stream.write(content)

    def _read(self, name: str) -> bytes:
        with self.store.filesystem.open_input_stream(self.store.at(self.folder, name)) as stream:
            content: bytes = stream.read()
            return content
