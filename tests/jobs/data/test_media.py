"""Images, sounds and captions: what they become, and that broken ones are refused in one sentence."""

from __future__ import annotations

import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jobs.data.media import (
    MOST_PIXELS,
    MediaError,
    decode_audio,
    decode_image,
    decode_pixels,
    decode_samples,
    decode_sized,
    encode_image,
    encode_samples,
    fit_image,
    normalise_caption,
    resample,
)
from tests.support.media import image_file, picture, picture_file, sound_file, tone

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="20" height="10">{}</svg>'
)


def bomb() -> bytes:
    """A PNG of a few bytes that says it has a side of 60,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_format_is_decoded(form: str) -> None:
    original = picture(3)
    decoded, size = decode_sized(image_file(original, form))
    assert (decoded.mode, decoded.size, size) == ("RGB", original.size, original.size)
    difference = np.asarray(decoded).astype(int) - np.asarray(original).astype(int)
    assert np.abs(difference).mean() < (1 if form in ("PNG", "BMP") else 8)


def test_svg_is_drawn_as_large_as_asked_for() -> None:
    drawn = decode_image(SVG.format('<rect width="10" height="10" fill="#ff0000"/>').encode(), longest=40)
    assert drawn.size == (40, 20)
    assert drawn.getpixel((5, 10)) == (255, 0, 0)
    assert drawn.getpixel((35, 10)) == (255, 255, 255)


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    palette = Image.new("P", (8, 8), 0)
    for data in (image_file(clear), image_file(palette, transparency=0), image_file(clear, "WEBP")):
        assert decode_image(data).getpixel((4, 4)) == (255, 255, 255)


def test_grey_of_sixteen_bits_keeps_its_shades() -> None:
    grey = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    assert decode_image(image_file(grey)).getpixel((0, 0)) == (128, 128, 128)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned, size = decode_sized(image_file(picture(1, 60, 30), "JPEG", exif=exif))
    assert turned.size == size == (30, 60)


def test_large_image_is_reduced_and_its_size_is_known() -> None:
    reduced, size = decode_sized(picture_file(1, 400, 100), longest=100)
    assert (reduced.size, size) == ((100, 25), (400, 100))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"\0" * 64, "not an image"),
        (b"just some text", "not an image"),
        (picture_file(1)[:200], "broken"),
        (image_file(picture(1), "JPEG")[:300], "broken"),
        (picture_file(1)[:40] + b"\xff" * 400, "broken"),
        (bomb(), "pixels"),
        (b"<svg", "SVG is broken"),
        (SVG.format("").encode("latin-1")[:-6] + b"\xff</svg>", "SVG is broken"),
        (b'<?xml version="1.0"?><html><!-- <svg --></html>', "cannot be drawn"),
        (SVG.format('<image xlink:href="/etc/passwd"/>').encode(), "outside itself"),
        (SVG.format('<image href=" &#x2f;etc/passwd"/>').encode(), "outside itself"),
        (SVG.format('<filter id="f"><feImage href="x.png"/></filter>').encode(), "outside itself"),
    ],
)
def test_broken_image_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(MediaError, match=says) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)


def test_bomb_is_refused_by_its_header() -> None:
    assert MOST_PIXELS < 60_000 * 60_000 and len(bomb()) < 1000


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damage_never_raises_anything_else(noise: bytes, place: int) -> None:
    for whole in (picture_file(2, 40, 30), image_file(picture(2, 40, 30), "WEBP")):
        damaged = whole[:place] + noise + whole[place + len(noise) :]
        try:
            decode_image(damaged)
        except MediaError as error:
            assert "\n" not in str(error)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 70))
def test_fit_keeps_the_aspect_on_white(width: int, height: int, size: int) -> None:
    black = fit_image(Image.new("RGB", (width, height)), size)
    assert black.shape == (size, size, 3) and black.dtype == np.uint8
    dark = (black == 0).all(axis=2)
    rows, columns = int(dark.any(axis=1).sum()), int(dark.any(axis=0).sum())
    assert max(rows, columns) == size
    assert abs(rows - max(1, size * height / max(width, height))) <= 1
    assert abs(columns - max(1, size * width / max(width, height))) <= 1
    assert (black[~dark] == 255).all()


def test_pixels_come_back_from_their_png() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert (decode_pixels(encode_image(pixels)) == pixels).all()
    assert encode_image(pixels) == encode_image(pixels.copy())
    with pytest.raises(MediaError, match="not RGB"):
        decode_pixels(image_file(Image.new("L", (4, 4))))
    with pytest.raises(MediaError, match="broken"):
        decode_pixels(b"nothing")


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_tone_keeps_its_pitch_at_any_rate(form: str, rate: int) -> None:
    decoded = decode_audio(sound_file(tone(440, 1.0, 44_100), 44_100, form), rate=rate)
    assert decoded.dtype == np.int16 and len(decoded) == rate
    spectrum = np.abs(np.fft.rfft(decoded.astype(np.float64)))
    assert abs(int(spectrum.argmax()) - 440) <= 1


def test_what_a_lower_rate_cannot_hold_is_filtered_out() -> None:
    loud = np.abs(resample(tone(6_000, 1.0, 44_100).astype(np.float64), 44_100, 8_000))
    assert loud.max() < 0.001


def test_channels_are_averaged() -> None:
    left = tone(300)
    both = np.stack([left, -left], axis=1)
    assert np.abs(decode_audio(sound_file(both), rate=16_000)).max() <= 1
    one = decode_audio(sound_file(np.stack([left, left], axis=1)), rate=16_000)
    assert (one == decode_audio(sound_file(left), rate=16_000)).all()


@given(
    st.integers(1, 400), st.sampled_from([8_000, 11_025, 16_000, 44_100]), st.sampled_from([8_000, 16_000])
)
def test_resampled_constant_stays_constant(length: int, given_rate: int, rate: int) -> None:
    ones = resample(np.ones(length), given_rate, rate)
    assert len(ones) == -(-length * rate // given_rate)
    middle = ones[len(ones) // 2 : len(ones) // 2 + 1]
    assert length < 200 or np.allclose(middle, 1.0)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no bytes"),
        (b"OggS" + b"\0" * 200, "not a sound"),
        (b"a text", "not a sound"),
        (sound_file(np.zeros(0, dtype=np.float32)), "no samples"),
        (sound_file(tone(440), form="OGG")[:60], "not a sound"),
    ],
    ids=["empty", "header", "text", "no-samples", "torn"],  # the bytes of a stream's number are random
)
def test_broken_sound_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(MediaError, match=says):
        decode_audio(data, rate=16_000)


@pytest.mark.parametrize("own", [1, 999, 384_001, 2_000_000_011])
def test_a_rate_that_would_take_all_memory_is_refused(own: int) -> None:
    with pytest.raises(MediaError, match=f"a rate of {own:,} Hz: what is taken is 1,000 to 384,000"):
        decode_audio(sound_file(np.zeros(100_000, np.float32), own), rate=16_000)


def test_samples_are_counted_before_and_after_resampling() -> None:
    slow, fast = (sound_file(np.zeros(10_000, np.float32), own) for own in (1_000, 48_000))
    assert len(decode_audio(slow, rate=16_000, most_samples=160_000)) == 160_000
    for data, most in ((slow, 159_999), (fast, 9_999)):
        with pytest.raises(MediaError, match=f"more than {most:,} samples"):
            decode_audio(data, rate=16_000, most_samples=most)


def test_reasons_are_the_same_in_every_process() -> None:
    for data in (b"OggS, and nothing more", b"RIFF" + b"\0" * 40):
        with pytest.raises(MediaError) as caught:
            decode_audio(data, rate=16_000)
        assert "0x" not in str(caught.value)


def test_samples_come_back_from_their_bytes() -> None:
    samples = np.array([0, 1, -1, 32767, -32768], dtype=np.int16)
    assert encode_samples(samples)[2:4] == b"\1\0"
    assert (decode_samples(encode_samples(samples)) == samples).all()


def test_caption_is_normalised() -> None:
    assert normalise_caption("  a\tred\r\n apple\u00a0. ") == "a red apple ."
    assert normalise_caption("e\u0301t\u00e9") == "\u00e9t\u00e9"
    assert normalise_caption("\ufeffpear\x00\x07\u202e!") == "pear!"
    assert normalise_caption("\u0646\u200c\u0645") == "\u0646\u200c\u0645"
    assert normalise_caption("x\ud800") == "x"


@given(st.text())
def test_normalised_caption_is_clean(text: str) -> None:
    once = normalise_caption(text)
    assert once.encode() is not None
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in once)
    assert once == once.strip() and "  " not in once
    assert normalise_caption(once) == once


def test_the_real_set_decodes() -> None:
    stamps = Path("/usr/share/tuxpaint/stamps/food/fruit")
    if not stamps.is_dir():
        pytest.skip("the Debian package tuxpaint-stamps-default is not installed")
    apple = decode_image((stamps / "apple_red.png").read_bytes())
    assert apple.mode == "RGB" and fit_image(apple, 64).shape == (64, 64, 3)
    spoken = decode_audio((stamps / "apple_green_desc_be.ogg").read_bytes(), rate=8_000)
    assert 4_000 < len(spoken) < 80_000 and np.abs(spoken).max() > 1_000
