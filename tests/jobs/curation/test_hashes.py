"""Copies are found by their hashes, other things are not; groups do not depend on order."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jobs.curation import hashes
from jobs.curation.groups import Groups, near_pairs
from jobs.data.media import decode_image, fit_image
from tests.support.media import image_file, picture, tone

NAMES = st.sampled_from("abcdefgh")


def seen(data: bytes) -> tuple[bytes, bytes]:
    image = decode_image(data)
    return hashes.image_hash(image), hashes.image_colour(fit_image(image, 64))


def test_image_copy_is_near_and_another_is_far() -> None:
    original = picture(7, 200, 160)
    bits, colour = seen(image_file(original))
    for copy in (
        image_file(original, "JPEG", quality=60),
        image_file(original.resize((100, 80))),
        image_file(original, "WEBP"),
    ):
        other_bits, other_colour = seen(copy)
        assert hashes.bit_distance(bits, other_bits) <= 4
        assert hashes.colour_distance(colour, other_colour) <= 4
    distances = [
        hashes.bit_distance(bits, seen(image_file(picture(number)))[0]) for number in range(100, 130)
    ]
    assert min(distances) > 8


def test_colour_tells_apart_what_grey_does_not() -> None:
    image = np.asarray(picture(3))
    swapped = np.ascontiguousarray(image[..., ::-1])
    assert hashes.colour_distance(hashes.image_colour(image), hashes.image_colour(swapped)) > 12
    assert hashes.colour_distance(hashes.image_colour(image), hashes.image_colour(image)) == 0


def test_captions_alike() -> None:
    key = hashes.caption_key
    assert key("A red apple.") == key("a  RED apple!") == "a red apple"
    assert key("\uff21 red apple") == key("A red apple")
    assert key("A red apple") != key("A green apple")
    assert key("?") == "?" and key("!!") != key("?")
    assert key("-1") == key("1") and key("a+b") != key("ab")


def test_clip_copy_is_near_and_another_is_far() -> None:
    def clip(*hertz: float, loudness: float = 0.5) -> np.ndarray:
        parts = [tone(each, 0.2, loudness=loudness) for each in hertz]
        return np.rint(np.concatenate(parts) * 32767).astype(np.int16)

    melody = hashes.clip_fingerprint(clip(440, 660, 550, 880), 16_000)
    assert len(melody) * 8 == hashes.CLIP_BITS
    quieter = hashes.clip_fingerprint(clip(440, 660, 550, 880, loudness=0.25), 16_000)
    other = hashes.clip_fingerprint(clip(880, 330, 700, 440), 16_000)
    assert hashes.bit_distance(melody, quieter) <= 12 < 40 < hashes.bit_distance(melody, other)


def test_short_clip_has_a_fingerprint() -> None:
    for length in (1, 2, 16, 17, 40):
        assert len(hashes.clip_fingerprint(np.ones(length, dtype=np.int16), 8_000)) == 32


@given(st.lists(st.tuples(NAMES, NAMES)), st.randoms())
def test_groups_do_not_depend_on_order(pairs: list[tuple[str, str]], random: object) -> None:
    shuffled = [pair[::-1] for pair in pairs]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = Groups(pairs), Groups(shuffled)
    for name in "abcdefgh":
        least = one.least(name)
        assert least == other.least(name) <= name
        assert one.least(least) == least
    for first, second in pairs:
        assert one.least(first) == one.least(second)


@given(st.lists(st.integers(0, 2**16 - 1), max_size=40), st.integers(0, 5))
def test_every_near_pair_is_found(values: list[int], distance: int) -> None:
    table = {f"{place:02d}": value.to_bytes(2, "big") for place, value in enumerate(values)}
    expected = {
        pair
        for pair in combinations(sorted(table), 2)
        if hashes.bit_distance(table[pair[0]], table[pair[1]]) <= distance
    }
    found = list(near_pairs(table, distance))
    assert set(found) == expected and len(found) == len(expected)
    assert not list(near_pairs(table, distance, lambda one, other: False))
