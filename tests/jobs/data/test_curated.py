"""A curated set read back: any rows in any order, one row group at a time, from any filesystem."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import fs

from jobs.data.curated import CuratedSet, open_set
from jobs.data.given_set import write_given_set
from jobs.data.tokenizer import CaptionTokenizer
from runtime.storage import Store

ROWS = {"train": (5, 0, 7), "held_out": (3,)}


def rows(first: int, count: int, tokenizer: CaptionTokenizer) -> list[dict[str, Any]]:
    return [
        {
            "sample": f"item{number}/en",
            "item": f"item{number}",
            "category": "fruit",
            "language": "en",
            "caption": f"apple {number}",
            "tokens": tokenizer.encode(f"apple {number}"),
            "image": bytes([number]) * 10 if number % 2 else None,
            "audio": None,
            "width": number,
            "height": 8,
        }
        for number in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of fifteen rows in four files with row groups of two."""
    folder = tmp_path_factory.mktemp("set")
    tokenizer = CaptionTokenizer(["en"])
    first, splits = 0, {}
    for split, counts in ROWS.items():
        files = []
        for count in counts:
            files.append(rows(first, count, tokenizer))
            first += count
        splits[split] = files
    write_given_set(
        folder,
        tokenizer,
        splits,
        rows_per_group=2,
        image_size=8,
        name="fruit",
        read=20,
        categories={"train": {"fruit": 12}, "held_out": {"fruit": 3}},
        languages={"train": {"en": 12}, "held_out": {"en": 3}},
        clips={"train": 0, "held_out": 0},
        source={"kind": "image_folder"},
    )
    return folder


@pytest.fixture(scope="module")
def curated(folder: Path) -> CuratedSet:
    return open_set(folder)


def test_splits_and_rows(curated: CuratedSet) -> None:
    assert curated.splits == ("train", "held_out")
    assert (curated.rows("train"), curated.rows("held_out")) == (12, 3)
    assert curated.table("train")["width"].to_pylist() == list(range(12))
    assert curated.table("held_out", ["caption"]).to_pylist() == [
        {"caption": f"apple {number}"} for number in (12, 13, 14)
    ]
    assert curated.tokenizer.decode(curated.table("train")["tokens"][3].as_py()) == "apple 3"
    curated.check()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 11), max_size=30))
def test_any_rows_in_any_order(curated: CuratedSet, indices: list[int]) -> None:
    assert curated.read("train", indices, ["width"])["width"].to_pylist() == indices
    assert curated.read("train", indices).to_pylist() == [
        curated.table("train").slice(index, 1).to_pylist()[0] for index in indices
    ]


def test_one_row_costs_one_row_group(curated: CuratedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    whole = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, *arguments: Any, **settings: Any) -> pa.Table:
        seen.append(group)
        return whole(self, group, *arguments, **settings)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert curated.read("train", [9, 8, 9], ["width"])["width"].to_pylist() == [9, 8, 9]
    assert seen == [1, 2]


def test_any_filesystem_will_do(folder: Path, curated: CuratedSet) -> None:
    for root in (
        folder.as_uri(),
        Store(fs.SubTreeFileSystem(str(folder.parent), fs.LocalFileSystem()), folder.name),
    ):
        there = open_set(root)
        assert there.digest == curated.digest
        assert there.read("train", [11]).equals(curated.read("train", [11]))
    assert pickle.loads(pickle.dumps(curated)).read("train", [4]).equals(curated.read("train", [4]))


def test_mistakes_are_told(curated: CuratedSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest.json in .*reknit curate"):
        open_set(tmp_path)
    with pytest.raises(ValueError, match='no split "test": choose train, held_out'):
        curated.rows("test")
    with pytest.raises(ValueError, match='no split "test"'):
        curated.read("test", [0])
    with pytest.raises(ValueError, match="12 rows, so none at 12"):
        curated.read("train", [12])
    with pytest.raises(ValueError, match='no column "text"'):
        curated.table("train", ["text"])
    (tmp_path / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="no manifest of format 1"):
        open_set(tmp_path)


def test_changed_files_are_noticed(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    copy = open_set(tmp_path)
    name = copy.manifest.splits["train"][0].name
    (tmp_path / name).write_bytes((folder / name).read_bytes() + b"x")
    with pytest.raises(ValueError, match="not what the manifest names"):
        copy.check()
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="by reknit curate"):
        copy.check()
    CaptionTokenizer(["de"]).save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not what the manifest names"):
        open_set(tmp_path)


def test_kinds_are_folders_with_enough_items_and_else_categories(tmp_path: Path) -> None:
    tokenizer = CaptionTokenizer(["de", "en"])
    folders = {"food/fruit/red": 2, "food/fruit/green": 2, "food/nuts": 3, "tools": 5, "": 1}
    items = [f"{folder}/{number}".strip("/") for folder, count in folders.items() for number in range(count)]

    def row(item: str, language: str) -> dict[str, Any]:
        category = item.split("/")[0] if "/" in item else "none"
        names = {"sample": f"{item}/{language}", "item": item, "category": category, "language": language}
        return {**rows(0, 1, tokenizer)[0], **names}

    split = [row(item, language) for item in items for language in ("de", "en")]
    write_given_set(
        tmp_path,
        tokenizer,
        {"train": [split[:7], split[7:]], "held_out": [[row("food/nuts/9", "en")]]},
        rows_per_group=4,
        image_size=8,
    )
    kinds, numbers = open_set(tmp_path).kinds()
    assert kinds == ("food", "food/fruit", "none", "tools"), "an item is one, in however many languages"
    wanted = ["food/fruit"] * 8 + ["food"] * 6 + ["tools"] * 10 + ["none"] * 2
    assert [kinds[number] for number in numbers] == wanted
