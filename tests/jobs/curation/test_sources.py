"""Sources: what they find, and that every kind of broken input costs its row and says why."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.curation.examine import examine_table
from jobs.curation.items import EXAMINED, Item, item_table
from jobs.curation.recipe import CurationRecipe
from jobs.curation.sources import list_units, read_unit
from tests.jobs.data.test_media import bomb
from tests.support.media import picture_file, sound_file, tone

PNG, WAV = picture_file(1), sound_file(tone(440))


def recipe(kind: str, path: Path, **sections: Any) -> CurationRecipe:
    source = {"kind": kind, "path": str(path), **sections.pop("source", {})}
    return CurationRecipe.model_validate(
        {"set": {"name": "toy", "folder": "toy", "image_size": 16}, "source": source, **sections}
    )


def items(settings: CurationRecipe) -> dict[str, Item]:
    found = [item for unit in list_units(settings) for item in read_unit(unit, settings)]
    assert len({item.name for item in found}) == len(found)
    return {item.name: item for item in found}


def fates(settings: CurationRecipe) -> dict[str, tuple[str, str] | None]:
    """Of every item (and "item:language", where captions differ): the filter and reason, None if kept."""
    found: dict[str, tuple[str, str] | None] = {}
    for unit in list_units(settings):
        for number, item in enumerate(read_unit(unit, settings)):
            row = examine_table(item_table(unit.key, number, True, item), settings).to_pylist()[0]
            if row["problem"] is not None:
                found[row["name"]] = ("reading", row["problem"])
            elif not row["captions"]:
                found[row["name"]] = ("caption", "")
            for caption in row["captions"]:
                drop = row["image_drop"] or (caption if caption["filter"] else None)
                name = row["name"] if caption["language"] == "en" else f"{row['name']}:{caption['language']}"
                found[name] = (drop["filter"], drop["reason"]) if drop else None
            for clip in row["clips"]:
                found[f"{row['name']} clip"] = (clip["filter"], clip["reason"]) if clip["filter"] else None
    return found


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_image_folder_finds_captions_clips_and_categories(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "pets/cat.png": PNG,
            "pets/cat.txt": "a cat",
            "pets/cat.fr.txt": "un chat",
            "pets/cat.fr.wav": WAV,
            "pets/cat.ogg": b"",
            "pets/cats.txt": "not of the cat",
            "dog.JPG": PNG,
            "dog.txt": "a dog",
            "notes.md": "nothing",
        },
    )
    found = items(recipe("image_folder", tmp_path))
    assert sorted(found) == ["dog", "pets/cat"]
    cat = found["pets/cat"]
    assert (cat.category, cat.image) == ("pets", PNG)
    assert {each.language: each.text for each in cat.captions} == {"en": "a cat", "fr": "un chat"}
    assert {each.language: each.data for each in cat.clips} == {"en": b"", "fr": WAV}
    assert (found["dog"].category, found["dog"].captions[0].text) == ("none", "a dog")


def test_two_images_of_one_name_are_two_items(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": PNG, "a.jpg": PNG, "a.txt": "one"})
    assert sorted(items(recipe("image_folder", tmp_path))) == ["a", "a.png"]


BROKEN_FILES: dict[str, tuple[dict[str, bytes | str], str, str]] = {
    "truncated image": ({"x.png": PNG[:300]}, "image", "broken"),
    "empty image": ({"x.png": b""}, "image", "no bytes"),
    "zero bytes": ({"x.png": b"\0" * 500}, "image", "not an image"),
    "text named png": ({"x.png": "hello"}, "image", "not an image"),
    "noise in the middle": ({"x.png": PNG[:60] + b"\xff" * 60 + PNG[120:]}, "image", "broken"),
    "bomb": ({"x.png": bomb()}, "image", "pixels"),
    "broken svg": ({"x.svg": "<svg"}, "image", "SVG is broken"),
    "svg that reads files": (
        {"x.svg": '<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/hostname"/></svg>'},
        "image",
        "outside itself",
    ),
    "tiny image": ({"x.png": picture_file(1, 31, 90)}, "resolution", "32 pixels"),
    "latin-1 caption": ({"x.txt": "café".encode("latin-1")}, "reading", "not UTF-8: byte 3"),
    "binary caption": ({"x.txt": PNG}, "reading", "not UTF-8: byte 0"),
    "cut utf-16": ({"x.txt": b"\xff\xfea"}, "reading", "not UTF-8"),
    "empty caption": ({"x.txt": ""}, "caption_length", "empty"),
    "caption of blanks": ({"x.txt": " \n\t "}, "caption_length", "empty"),
    "caption of control characters": ({"x.txt": "\0\1\2"}, "caption_length", "empty"),
    "wrongly decoded caption": ({"x.txt": "caf\ufffd"}, "encoding", "U\\+FFFD"),
    "endless caption": ({"x.txt": "word " * 1000}, "caption_length", "longer"),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_broken_file_costs_its_row(kind: str, tmp_path: Path) -> None:
    files, filter_name, reason = BROKEN_FILES[kind]
    whole: dict[str, bytes | str] = {"good.png": PNG, "good.txt": "a good one", "x.txt": "a caption"}
    if "x.svg" not in files:
        whole["x.png"] = PNG
    write(tmp_path, {**whole, **files})
    found = fates(recipe("image_folder", tmp_path))
    assert found["good"] is None
    dropped = found["x"]
    assert dropped is not None and dropped[0] == filter_name
    with pytest.raises(ValueError, match=reason):
        raise ValueError(dropped[1])


def test_marks_of_byte_order_do_no_harm(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"a.png": PNG, "a.txt": "\ufeffa café".encode(), "b.png": PNG, "b.txt": "a café".encode("utf-16")},
    )
    settings = recipe("image_folder", tmp_path)
    assert fates(settings) == {"a": None, "b": None}
    assert [item.captions[0].text for item in items(settings).values()] == ["a café", "a café"]


def test_missing_captions_and_links_that_lead_nowhere(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"alone.png": PNG, "good.png": PNG, "good.txt": "a good one", "loop.txt": "loop", "gone.txt": "gone"},
    )
    os.symlink("loop.png", tmp_path / "loop.png")
    os.symlink("nowhere.png", tmp_path / "gone.png")
    os.symlink(".", tmp_path / "again")
    (tmp_path / "folder.png").mkdir()
    found = fates(recipe("image_folder", tmp_path))
    assert found.keys() == {"alone", "good", "loop", "gone"}
    assert found["good"] is None and found["alone"] == ("caption", "")
    assert "symbolic links" in str(found["loop"]) and "No such file" in str(found["gone"])


def test_broken_clips_cost_the_clip(tmp_path: Path) -> None:
    clips: dict[str, bytes] = {
        "noise.ogg": b"OggS" + bytes(range(256)),
        "empty.wav": b"",
        "silent.wav": sound_file(tone(440, loudness=0.0001)),
        "short.wav": sound_file(tone(440, 0.05)),
        "long.wav": sound_file(tone(440, 11.0)),
        "good.wav": WAV,
    }
    for name, sound in clips.items():
        stem = name.partition(".")[0]
        write(tmp_path, {name: sound, f"{stem}.png": PNG, f"{stem}.txt": "spoken"})
    found = fates(recipe("image_folder", tmp_path))
    assert all(found[name.partition(".")[0]] is None for name in clips)
    filters = {
        name: (found[f"{name} clip"] or ("kept",))[0]
        for name in ("noise", "empty", "silent", "short", "long", "good")
    }
    assert filters == {
        "noise": "clip",
        "empty": "clip",
        "silent": "silence",
        "short": "clip_length",
        "long": "clip_length",
        "good": "kept",
    }


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


def test_name_that_is_no_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path, {f"{name}.png": PNG, f"{name}.txt": "a café"})
    assert fates(recipe("image_folder", tmp_path)) == {"caf\\udce9": None}


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


def test_tuxpaint_captions_line_by_line(tmp_path: Path) -> None:
    text = b"An apple.\nfr.utf8=Une pomme.\n\nnonsense\nca@valencia.utf8=Una poma.\n" + b"de.utf8=\xe4pfel\n"
    write(
        tmp_path,
        {
            "food/apple 1.5.txt": text,
            "food/apple 1.5.png": PNG,
            "food/apple 1.5_desc.ogg": WAV,
            "food/apple 1.5_desc_fr.ogg": WAV,
            "food/apple 1.5_desc_ru.ogg": WAV,
            "food/pear.txt": "A pear.",
            "food/pear.svg": '<svg xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt">'
            '<rect width="5" height="9"/></svg>',
            "food/plum.txt": b"\xff",
        },
    )
    found = items(recipe("tuxpaint", tmp_path))
    apple = found["food/apple 1.5"]
    assert {each.language: each.text for each in apple.captions} == {
        "en": "An apple.",
        "fr": "Une pomme.",
        "ca@valencia": "Una poma.",
        "de": None,
    }
    assert sorted(each.language for each in apple.clips) == ["en", "fr"]
    fate = fates(recipe("tuxpaint", tmp_path))
    assert fate["food/pear"] is None
    assert fate["food/plum"] == ("reading", "the text is not UTF-8: byte 0")
    assert fate["food/apple 1.5:de"] == ("reading", "the text is not UTF-8: byte 0")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("tuxpaint", "Debian package tuxpaint-stamps-default"),
        ("image_folder", "source.path to a folder of images"),
        ("parquet", "source.path to"),
        ("webdataset", "source.path to"),
    ],
)
def test_missing_or_empty_source_is_told(kind: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(ValueError, match=says) as caught:
            list_units(recipe(kind, path))
        assert str(path) in str(caught.value)


def test_captions_file_that_is_no_use(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": PNG, "captions.txt": "x", "empty.csv": "image,text\n"})
    for name, says in (
        ("nowhere.csv", "there is no captions file"),
        ("captions.txt", "neither"),
        ("empty.csv", "no rows"),
    ):
        with pytest.raises(ValueError, match=says):
            list_units(recipe("image_folder", tmp_path, source={"captions": name}))


def test_a_change_of_a_file_changes_its_unit(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": PNG, "a.txt": "a cat", "b.png": PNG, "b.txt": "a dog"})
    settings = recipe("image_folder", tmp_path)
    before = list_units(settings)
    write(tmp_path, {"b.txt": "a dogfish"})
    after = list_units(settings)
    assert before[0] == after[0] and before[1] != after[1] and before[1].key == after[1].key


def test_examined_items_fit_their_schema(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": PNG, "a.txt": "a cat", "a.wav": WAV})
    settings = recipe("image_folder", tmp_path)
    examined = examine_table(item_table("a", 0, True, items(settings)["a"]), settings)
    assert examined.schema == EXAMINED
    row = examined.to_pylist()[0]
    assert (row["width"], row["height"], len(row["sounds"])) == (96, 80, 1)
    assert len(row["sounds"][0]) == 2 * row["clips"][0]["samples"] == 2 * 8_000
