"""A folder of raw images, captions and clips with one of each thing that a filter is to find."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from PIL import Image, ImageFilter

from tests.support.media import image_file, picture, picture_file, sound_file, tone

GOOD = 24

DROPPED = {
    "broken/bomb": "image",
    "broken/cut": "image",
    "broken/empty": "image",
    "broken/latin": "reading",
    "broken/link": "image",
    "broken/text": "image",
    "broken/wordless": "caption",
    "odd/blank": "blank",
    "odd/blurred": "sharpness",
    "odd/endless": "caption_length",
    "odd/german": "language",
    "odd/long": "aspect",
    "odd/small": "resolution",
    "twice/copy": "duplicate_image",
    "twice/nearly": "duplicate_image",
    "twice/saying": "duplicate_caption",
}
"""The filter that every bad item is for."""


def raw_folder(folder: Path) -> Path:
    """Good pictures in three categories, captioned in two languages, a third of them spoken; and DROPPED."""
    from tests.jobs.data.test_media import bomb

    for number in range(GOOD):
        name = f"{'abc'[number % 3]}/{number:02d}"
        put(folder, f"{name}.png", picture_file(number))
        put(folder, f"{name}.txt", f"picture number {number}")
        put(folder, f"{name}.fr.txt", f"l'image num\u00e9ro {number}")
        if number % 3 == 0:
            melody = [tone(300 + 97 * ((number * step) % 11), 0.15) for step in (1, 3, 5, 7)]
            put(folder, f"{name}.wav", sound_file(np.concatenate(melody)))
    waves = sound_file(tone(440, loudness=0.0001))
    put(folder, "a/00.fr.wav", waves)  # silent
    put(folder, "a/03.fr.ogg", b"OggS, and nothing more")
    images: dict[str, bytes] = {
        "broken/bomb": bomb(),
        "broken/cut": picture_file(50)[:250],
        "broken/empty": b"",
        "broken/latin": picture_file(51),
        "broken/text": b"no picture at all",
        "broken/wordless": picture_file(52),
        "odd/blank": image_file(Image.new("RGB", (90, 90), (200, 210, 220))),
        "odd/blurred": image_file(picture(53).filter(ImageFilter.GaussianBlur(20))),
        "odd/endless": picture_file(54),
        "odd/german": picture_file(55),
        "odd/long": picture_file(56, 700, 90),
        "odd/small": picture_file(57, 30, 90),
        "twice/copy": picture_file(4),
        "twice/nearly": image_file(picture(5).resize((94, 78)), "JPEG", quality=80),
        "twice/saying": picture_file(58),
    }
    captions: dict[str, str | bytes] = {
        "broken/latin": "caf\u00e9".encode("latin-1"),
        "odd/endless": "on and on " * 50,
        "twice/saying": "Picture number 7!",
    }
    for name, data in images.items():
        put(folder, f"{name}.png", data)
        language = ".de" if name == "odd/german" else ""
        if name != "broken/wordless":
            put(folder, f"{name}{language}.txt", captions.get(name, f"this is {name}"))
    os.symlink("link.png", folder / "broken" / "link.png")
    put(folder, "broken/link.txt", "a loop")
    return folder


def put(folder: Path, name: str, content: bytes | str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def raw_recipe(path: Path, source: Path, folder: Path, **sections: Any) -> Path:
    """A recipe file for ``source`` whose set goes to ``folder``."""
    values: dict[str, Any] = {
        "set": {"name": "raw", "folder": str(folder), "image_size": 32, "rows_per_shard": 10},
        "source": {"kind": "image_folder", "path": str(source)},
        "caption": {"languages": ["en", "fr"]},
        "split": {"held_out": 0.2},
        "tokens": {"kind": "bpe", "vocabulary": 300},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path.write_text(tomli_w.dumps(values))
    return path
