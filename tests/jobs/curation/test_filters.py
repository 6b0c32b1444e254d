"""Every filter: what it keeps, what it drops, and that a value on the threshold is kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageFilter

from jobs.curation import filters
from tests.support.media import picture, tone

FLAT = np.full((40, 40, 3), 200, dtype=np.uint8)


def samples(loudness: float) -> np.ndarray:
    return np.rint(tone(440, loudness=loudness) * 32767).astype(np.int16)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 500))
def test_resolution_looks_at_the_shorter_side(width: int, height: int, least: int) -> None:
    assert (filters.resolution(width, height, least) is None) == (min(width, height) >= least)


@given(st.integers(1, 500), st.integers(1, 500))
def test_aspect_is_the_same_lying_and_standing(width: int, height: int) -> None:
    assert filters.aspect(width, height, 3.0) == filters.aspect(height, width, 3.0)
    assert (filters.aspect(width, height, 3.0) is None) == (max(width, height) / min(width, height) <= 3)


def test_aspect_on_the_threshold_is_kept() -> None:
    assert filters.aspect(300, 100, 3.0) is None
    assert filters.aspect(301, 100, 3.0) == "the longer side is more than 3 times the shorter"


def test_blank_image_is_dropped() -> None:
    nearly = FLAT.copy()
    nearly[0, 0] = 190
    assert filters.blank(FLAT, 0.0) is None
    assert filters.blank(FLAT, 0.1) is not None
    assert filters.blank(nearly, 2.0) is not None
    assert filters.blank(np.asarray(picture(1)), 10.0) is None


def test_blurred_image_is_less_sharp() -> None:
    sharp = picture(5)
    values = [
        filters.laplacian_variance(np.asarray(sharp.filter(ImageFilter.GaussianBlur(radius))))
        for radius in (0, 1, 3, 8)
    ]
    assert values == sorted(values, reverse=True) and values[0] > 100 * values[-1]
    assert filters.sharpness(np.asarray(sharp), values[0]) is None
    assert filters.sharpness(np.asarray(sharp), math.nextafter(values[0], math.inf)) is not None


def test_laplacian_of_a_single_dot() -> None:
    dot = np.zeros((5, 5, 3), dtype=np.uint8)
    dot[2, 2] = 100
    around = np.array([[0, 100, 0], [100, -400, 100], [0, 100, 0]])
    assert filters.laplacian_variance(dot) == pytest.approx(around.var())
    assert filters.sharpness(dot[:2], 1e9) is None


def test_language_is_one_of_those_wanted() -> None:
    assert filters.language("fr", ("en", "fr")) is None
    assert filters.language("fr", ()) is None
    assert filters.language("de", ("en", "fr")) is not None


def test_replacement_character_gives_a_wrong_encoding_away() -> None:
    assert filters.encoding("caf\u00e9") is None
    assert filters.encoding("caf\ufffd") is not None


@given(st.text(), st.integers(0, 20), st.integers(20, 40))
def test_caption_length(text: str, shortest: int, longest: int) -> None:
    kept = filters.caption_length(text, shortest, longest) is None
    assert kept == (bool(text) and shortest <= len(text) <= longest)


def test_clip_length_in_seconds() -> None:
    assert filters.clip_length(8_000, 16_000, 0.5, 2.0) is None
    assert filters.clip_length(32_000, 16_000, 0.5, 2.0) is None
    assert filters.clip_length(7_999, 16_000, 0.5, 2.0) == "shorter than 0.5 s"
    assert filters.clip_length(32_001, 16_000, 0.5, 2.0) == "longer than 2 s"


def test_silence_by_loudness() -> None:
    assert filters.loudness(np.zeros(10, dtype=np.int16)) == -math.inf
    assert filters.loudness(np.full(10, -32768, dtype=np.int16)) == 0.0
    assert filters.loudness(samples(0.5)) - filters.loudness(samples(0.05)) == pytest.approx(20, abs=0.1)
    assert filters.silence(samples(0.5), -40) is None
    assert filters.silence(samples(0.001), -50) == "silent: below -50 dB of full scale"
