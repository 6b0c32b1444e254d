"""Sources: what they find, and that every kind of broken input costs its row and says why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.curation.examine import examine_table
from jobs.curation.items import EXAMINED, item_table
from jobs.curation.sources import list_units
from tests.jobs.data.test_media import bomb
from tests.support.media import picture_file, sound_file, tone
from tests.support.sources import PNG, WAV, fates, items, recipe, write


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


def test_name_that_is_no_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path, {f"{name}.png": PNG, f"{name}.txt": "a café"})
    assert fates(recipe("image_folder", tmp_path)) == {"caf\\udce9": None}


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
