"""What an interrupted curation leaves, on a filesystem as strict about names as an object store."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import fs

from jobs.curation.examine import examine_table
from jobs.curation.items import Caption, Item, item_table
from jobs.curation.recipe import CurationRecipe
from jobs.curation.shards import Shard, write_shard
from jobs.curation.work import Work
from jobs.data.tokenizer import CaptionTokenizer
from runtime.storage import Store
from tests.support.media import picture_file

RECIPE = CurationRecipe.model_validate(
    {
        "set": {"name": "toy", "folder": "toy", "image_size": 16},
        "source": {"kind": "webdataset", "path": "toy"},
    }
)


@pytest.fixture(params=["local", "strict"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Work:
    if request.param == "local":
        return Work(Store.open(tmp_path / "set"), "k1")
    return Work(Store(fs._MockFileSystem(), "bucket/set"), "k1")


def examined(unit: str, numbers: list[int], of: int) -> pa.Table:
    tables = [
        item_table(
            unit,
            number,
            number == of - 1,
            Item(f"{unit}/{number}", "x", picture_file(number), (Caption("en", f"caption {number}"),)),
        )
        for number in numbers
    ]
    return examine_table(pa.concat_tables(tables), RECIPE)


def test_unit_is_finished_when_every_item_is_kept(work: Work) -> None:
    assert work.finished_units() == set()
    work.keep(examined("a", [0, 1], 3))
    work.keep(examined("b", [1], 2))  # the last, but not the first
    work.keep(examined("c", [0], 1))
    assert work.finished_units() == {"c"}
    work.keep(examined("a", [2], 3))
    work.keep(examined("b", [0], 2))
    assert work.finished_units() == {"a", "b", "c"}


def test_item_that_was_kept_twice_is_seen_once(work: Work) -> None:
    work.keep(examined("a", [0], 2))
    work.keep(examined("a", [0, 1], 2))
    work.keep(examined("a", [0, 1], 2))
    work.keep(examined("gone", [0], 1))
    assert [seen.name for seen in work.seen(["a"])] == ["a/0", "a/1"]
    assert len([info for info in work.store.children(work.folder)]) == 3


def test_payload_is_read_by_place(work: Work) -> None:
    work.keep(examined("a", list(range(20)), 20))
    seen = {each.name: each for each in work.seen(["a"])}
    places = {name: (seen[name].file, seen[name].row) for name in ("a/19", "a/0", "a/8")}
    payload = work.payload(places.values(), ["name", "image"])
    assert {name: payload[place]["name"] for name, place in places.items()} == {name: name for name in places}
    assert len({payload[place]["image"] for place in places.values()}) == 3


def test_shard_that_was_written_is_not_written_again(work: Work) -> None:
    tokenizer, shard = CaptionTokenizer(["en"]), Shard("train-00000-of-00001.parquet", "[]")
    assert work.recorded(shard.name) is None
    file = write_shard(shard, work, tokenizer)
    assert work.recorded(shard.name) == file
    assert write_shard(Shard(shard.name, "not even read"), work, tokenizer) == file
    work.publish(shard.name, b"cut off")
    assert work.recorded(shard.name) is None
    assert write_shard(shard, work, tokenizer) == file and work.store.size(shard.name) == file.bytes


def test_finished_set_has_no_work_and_no_older_files(work: Work) -> None:
    older = Work(work.store, "k0")
    older.keep(examined("a", [0], 1))
    older.publish("train-00007-of-00008.parquet", b"of an older set")
    older.publish("notes.parquet", b"somebody's own")
    work.keep(examined("a", [0], 1))
    work.publish("train-00000-of-00001.parquet", b"x")
    assert not work.done()
    work.finish(["train-00000-of-00001.parquet"])
    assert work.done() and not older.done()
    names = {info.base_name for info in work.store.children()}
    assert names == {".curated", "notes.parquet", "train-00000-of-00001.parquet"}
    work.publish("manifest.json", b"{}")
    older.begin()
    assert not work.done() and work.store.size("manifest.json") is None
