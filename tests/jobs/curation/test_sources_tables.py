"""Sources whose items are rows of tables or members of archives: whatever is broken costs its row."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.curation.sources import list_units, read_unit
from tests.support.media import picture_file
from tests.support.sources import PNG, WAV, fates, items, recipe, write


def test_csv_with_broken_rows(tmp_path: Path) -> None:
    lines = [
        b"image,text,language,category",
        b"a.png,a cat,en,pets",
        b'a.png,"un chat, gris",fr,pets',
        b"missing.png,nothing there,en,",
        b"a.png,too few",
        b"a.png,caf\xe9,en,pets",
        b'a.png,"never closed,en,pets',
        b"../outside.png,a secret,en,",
        b"",
    ]
    write(tmp_path / "raw", {"a.png": PNG, "captions.csv": b"\n".join(lines)})
    write(tmp_path, {"outside.png": PNG})
    settings = recipe("image_folder", tmp_path / "raw", source={"captions": "captions.csv"})
    found = fates(settings)
    assert found.pop("a.png") is None and found.pop("a.png:fr") is None
    assert items(settings)["a.png"].category == "pets"
    missing = found.pop("missing.png")
    assert missing is not None and missing[0] == "image" and "No such file" in missing[1]
    reasons = {name: fate[1] for name, fate in found.items() if fate}
    assert reasons == {
        "captions.csv:5": "the row has 2 cells, the header 4",
        "captions.csv:6": "the text is not UTF-8: byte 9",
        "captions.csv:7": "not a row of csv: unexpected end of data",
        "captions.csv:8": 'the column "image" names a file outside the folder',
    }


def test_csv_with_wrong_columns(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": PNG, "captions.csv": "file,words\na.png,a cat\n"})
    found = fates(recipe("image_folder", tmp_path, source={"captions": "captions.csv"}))
    assert found == {"captions.csv:2": ("reading", 'the column "image" is missing')}
    named = {"captions": "captions.csv", "image_column": "file", "text_column": "words"}
    assert fates(recipe("image_folder", tmp_path, source=named)) == {"a.png": None}


def test_jsonl_with_broken_lines(tmp_path: Path) -> None:
    lines = [
        '{"image": "a.png", "text": "a cat"}',
        '{"image": "a.png"',
        "[1]",
        '{"image": "a.png", "text": 5}',
        "[" * 9999,
    ]
    lines.append('{"image": "a.png", "text": "half \\ud800", "language": "de"}')
    write(tmp_path, {"a.png": PNG, "all.jsonl": "\n".join(lines)})
    found = fates(recipe("image_folder", tmp_path, source={"captions": "all.jsonl"}))
    assert found.pop("a.png") is None
    assert (found.pop("a.png:de") or ("",))[0] == "encoding"
    assert sorted(found) == ["all.jsonl:2", "all.jsonl:3", "all.jsonl:4", "all.jsonl:5"]
    assert all(fate is not None and fate[0] == "reading" for fate in found.values())


def table(**columns: Any) -> pa.Table:
    return pa.table(columns)


def test_parquet_rows_of_one_item(tmp_path: Path) -> None:
    rows = table(
        image=[{"bytes": PNG, "path": "a"}, None, {"bytes": PNG, "path": "b"}],
        text=["a cat", "un chat", "a dog"],
        language=["en", "fr", None],
        item=["cat", "cat", None],
        category=["pets", "pets", "dogs"],
        audio=[WAV, None, None],
        other=[1, 2, 3],
    )
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=2)
    settings = recipe("parquet", tmp_path)
    found = [item for unit in list_units(settings) for item in read_unit(unit, settings)]
    assert [(item.name, item.category, item.captions[0].language, bool(item.image)) for item in found] == [
        ("cat", "pets", "en", True),
        ("cat", "pets", "fr", False),
        ("a.parquet#00001/000000", "dogs", "en", True),
    ]
    assert found[0].clips[0].data == WAV


def test_broken_parquet(tmp_path: Path) -> None:
    pq.write_table(table(image=[PNG], text=["a cat"]), tmp_path / "good.parquet", compression="none")
    good = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(good[:-20])
    (tmp_path / "text.parquet").write_text("not Parquet")
    page = good.index(b"a cat") - 40
    (tmp_path / "damaged.parquet").write_bytes(good[:page] + b"\xff" * 30 + good[page + 30 :])
    pq.write_table(table(picture=[PNG], words=["a cat"]), tmp_path / "columns.parquet")
    pq.write_table(table(image=[PNG, PNG], text=[b"caf\xe9", b"a caf\xc3\xa9"]), tmp_path / "bytes.parquet")
    pq.write_table(table(image=[5], text=[7]), tmp_path / "numbers.parquet")
    latin = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9"))
    pq.write_table(table(image=[PNG], text=latin), tmp_path / "latin.parquet")
    found = fates(recipe("parquet", tmp_path))
    kept = {name for name, fate in found.items() if fate is None}
    assert kept == {"good.parquet#00000/000000", "bytes.parquet#00000/000001"}
    filters = {name.partition(".")[0]: fate for name, fate in found.items() if fate}
    assert {name: fate[0] for name, fate in filters.items()} == dict.fromkeys(
        ("cut", "text", "damaged", "columns", "bytes", "latin", "numbers"), "reading"
    )
    assert 'column "image" is missing; the file has picture, words' in filters["columns"][1]


def tar(members: dict[str, bytes], compression: str = "") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_webdataset_members_of_one_item(tmp_path: Path) -> None:
    about = {"caption": "a dog", "language": "en", "category": "dogs"}
    members = {
        "pets/1.png": PNG,
        "pets/1.txt": b"a cat",
        "pets/1.fr.txt": b"un chat",
        "pets/1.fr.wav": WAV,
        "2.jpg": PNG,
        "2.json": json.dumps(about).encode(),
        "3.png": PNG,
        "4.txt": b"no image",
        "5.png": PNG,
        "5.txt": b"caf\xe9",
        "6.png": PNG,
        "6.json": b"{",
        "README": b"nothing",
    }
    write(tmp_path, {"a.tar": tar(members), "deep/b.tar.gz": tar({"1.png": PNG, "1.txt": b"a bird"}, "gz")})
    settings = recipe("webdataset", tmp_path)
    first = items(settings)["a.tar/pets/1"]
    assert first.category == "pets" and first.image == PNG
    assert {each.language: each.text for each in first.captions} == {"en": "a cat", "fr": "un chat"}
    assert [each.language for each in first.clips] == ["fr"]
    assert items(settings)["a.tar/2"].category == "dogs"
    found = {name: fate and fate[0] for name, fate in fates(settings).items()}
    assert found == {
        "a.tar/pets/1": None,
        "a.tar/pets/1:fr": None,
        "a.tar/pets/1 clip": None,
        "a.tar/2": None,
        "a.tar/3": "caption",
        "a.tar/4": "image",
        "a.tar/5": "reading",
        "a.tar/6": "reading",
        "deep/b.tar.gz/1": None,
    }


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda whole: whole[: min(5_000, len(whole) // 2)], 1),
        (lambda whole: b"", 0),
        (lambda whole: b"not a tar" * 100, 0),
        (lambda whole: whole[:1024] + b"\xff" * 512 + whole[1536:], None),
    ],
)
@pytest.mark.parametrize("compression", ["", "gz", "xz"])
def test_broken_tar_keeps_what_came_before(
    damage: Callable[[bytes], bytes], kept: int | None, compression: str, tmp_path: Path
) -> None:
    members = {
        f"{number}.{ending}": data
        for number in range(4)
        for ending, data in (("png", picture_file(number)), ("txt", b"words"))
    }
    write(tmp_path, {"broken.tar": damage(tar(members, compression)), "good.tar": tar(members)})
    found = fates(recipe("webdataset", tmp_path))
    assert sum(fate is None for name, fate in found.items() if name.startswith("good.tar/")) == 4
    broken = {name: fate for name, fate in found.items() if name.startswith("broken.tar")}
    assert any(fate is not None for fate in broken.values())
    if kept is not None and not compression:
        assert sum(fate is None for fate in broken.values()) >= kept
