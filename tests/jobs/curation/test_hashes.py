"""Copies are found by their hashes, other things are not; groups do not depend on order."""

from __future__ import annotations

import time
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.curation import hashes
from jobs.curation.groups import Groups, near_links
from jobs.data.media import decode_image, fit_image
from tests.support.media import image_file, picture, tone

NAMES = st.sampled_from("abcdefgh")


def seen(data: bytes) -> tuple[bytes, bytes]:
    image = decode_image(data)
    return hashes.image_hash(image), hashes.image_colour(fit_image(image, 64))


def apart(*colours: bytes) -> float:
    one_C, other_C = hashes.colour_levels(colours)
    return float(hashes.colour_distances(one_C, other_C[None])[0])


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
        assert apart(colour, other_colour) <= 4
    distances = [
        hashes.bit_distance(bits, seen(image_file(picture(number)))[0]) for number in range(100, 130)
    ]
    assert min(distances) > 8


def test_colour_tells_apart_what_grey_does_not() -> None:
    image = np.asarray(picture(3))
    swapped = np.ascontiguousarray(image[..., ::-1])
    assert apart(hashes.image_colour(image), hashes.image_colour(swapped)) > 12
    assert apart(hashes.image_colour(image), hashes.image_colour(image)) == 0


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
    assert len(melody) * 8 == 256
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


@given(
    st.lists(st.one_of(st.integers(0, 2**16 - 1), st.integers(0, 3)), max_size=40),
    st.integers(0, 5),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_links_make_the_groups_that_all_near_pairs_make(
    values: list[int], distance: int, modulus: int | None
) -> None:
    """``modulus``: only names whose places differ by a multiple of it, or by one, are close."""
    table = {f"{place:02d}": value.to_bytes(2, "big") for place, value in enumerate(values)}

    def close(one: int, others: Any) -> Any:
        apart = np.abs(np.asarray(others) - one)
        return np.ones(len(others), bool) if modulus is None else (apart % modulus == 0) | (apart == 1)

    near = {
        pair
        for pair in combinations(sorted(table), 2)
        if hashes.bit_distance(table[pair[0]], table[pair[1]]) <= distance
        and close(int(pair[0]), [int(pair[1])])[0]
    }
    links = list(near_links(table, distance, None if modulus is None else close))
    assert {(min(link), max(link)) for link in links} <= near
    expected, found = Groups(near), Groups(links)
    assert all(found.least(name) == expected.least(name) for name in table)
    assert len(links) == len(table) - len({found.least(name) for name in table}), "no more than it takes"


@pytest.mark.parametrize("groups", [1, 20_000])
def test_many_equal_hashes_take_no_pair_each(groups: int) -> None:
    """Such as blank images: 200 million pairs would take minutes and gigabytes."""
    count = 20_000
    table = {f"{place:05d}": bytes(8) for place in range(count)}
    group_N = np.arange(count) % groups
    began = time.process_time()
    links = Groups(near_links(table, 8, lambda one, others: group_N[others] == group_N[one]))
    assert len({links.least(name) for name in table}) == groups
    assert time.process_time() - began < 5.0
