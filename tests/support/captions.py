"""A small curated set on disk: drawn pictures, tones and captions of many lengths in three languages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jobs.data.given_set import write_given_set
from jobs.data.media import encode_image, encode_samples, fit_image
from jobs.data.tokenizer import CaptionTokenizer
from tests.support.media import picture, tone

RATE = 8000
SIZE = 16
LANGUAGES = ("de", "en", "fr")
COUNTS: Mapping[str, tuple[int, ...]] = {"train": (20, 17), "held_out": (7,)}
"""Rows of the files of every split."""

Row = dict[str, Any]


def drawn_row(number: int, tokenizer: CaptionTokenizer) -> Row:
    """Every fifth has no image; every third has a clip."""
    caption = "a" * (1 + number * 7 % 6) + str(number)
    clip = tone(200.0 + 20 * number, seconds=0.1 + 0.05 * (number % 3), rate=RATE)
    return {
        "sample": f"item{number}/{LANGUAGES[number % 3]}",
        "item": f"item{number}",
        "category": "drawn",
        "language": LANGUAGES[number % 3],
        "caption": caption,
        "tokens": tokenizer.encode(caption),
        "image": None if number % 5 == 4 else encode_image(fit_image(picture(number), SIZE)),
        "audio": encode_samples((clip * 32767).astype(np.int16)) if number % 3 == 0 else None,
        "width": 96,
        "height": 80,
    }


def coloured_row(
    item: int,
    tokenizer: CaptionTokenizer,
    *,
    category: str,
    language: str,
    caption: str,
    colour: tuple[int, int, int],
    noise: int,
) -> Row:
    """Its picture is of one colour, each pixel off it by less than ``noise``; the same for all of an item."""
    off = np.random.default_rng(item).integers(-noise, noise, (SIZE, SIZE, 3))
    return {
        "sample": f"item{item}/{language}",
        "item": f"item{item}",
        "category": category,
        "language": language,
        "caption": caption,
        "tokens": tokenizer.encode(caption),
        "image": encode_image(np.clip(np.asarray(colour) + off, 0, 255).astype(np.uint8)),
        "audio": None,
        "width": SIZE,
        "height": SIZE,
    }


def write_set(
    folder: Path,
    counts: Mapping[str, tuple[int, ...]] = COUNTS,
    row: Callable[[int, CaptionTokenizer], Row] = drawn_row,
) -> Path:
    """Writes the set with row groups of four rows; returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CaptionTokenizer(LANGUAGES)
    numbers = itertools.count()
    splits = {
        split: [[row(next(numbers), tokenizer) for _ in range(count)] for count in rows_of_files]
        for split, rows_of_files in counts.items()
    }
    write_given_set(
        folder,
        tokenizer,
        splits,
        rows_per_group=4,
        image_size=SIZE,
        audio_rate=RATE,
        source={"kind": "drawn"},
    )
    return folder
