"""Images, sound and captions as pixels, samples and clean text: one way for curating, training and serving.

Everything here is a pure function of its arguments: the same bytes in, the same bytes out, whoever asks.
What cannot be decoded raises MediaError with one sentence about what is wrong.
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from functools import lru_cache
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import resvg_py
import soundfile
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What Pillow may be given; its other parsers are seldom used and have been less looked at."""

MOST_PIXELS = 64_000_000
"""A larger image counts as a decompression bomb: as RGB it would take 192 MB."""

MOST_SVG_BYTES = 8_000_000
MOST_AUDIO_SAMPLES = 48_000 * 600
"""Ten minutes at 48 kHz; counted over all channels."""

LOWEST_RATE, HIGHEST_RATE = 1_000, 384_000
"""In Hz, of a sound that is given: the filter for a ratio further from 1 would take all memory."""

_FILTER = Image.Resampling.LANCZOS
_WHITE = (255, 255, 255)
# of libpng and zlib: part of the bytes, so it is said and not left to a default
_PNG_LEVEL = 6
_ZERO_CROSSINGS = 12
_KAISER_BETA = 8.0


class MediaError(ValueError):
    """An image or a sound that cannot be used: one sentence that says why."""


def decode_image(data: bytes, *, longest: int = 1024, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """RGB, upright, over white, with no side above ``longest``: a larger one is reduced, an SVG drawn to fit.

    PNG, JPEG, WebP, GIF (its first frame), BMP and SVG. Raises MediaError, also for more than
    ``most_pixels``.
    """
    return decode_sized(data, longest=longest, most_pixels=most_pixels)[0]


def decode_sized(
    data: bytes, *, longest: int = 1024, most_pixels: int = MOST_PIXELS
) -> tuple[Image.Image, tuple[int, int]]:
    """As ``decode_image``, with the original's (width, height); an SVG's are those it is drawn at."""
    if not data:
        raise MediaError("the image is empty: it has no bytes")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images, which are refused below by a limit of our own
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if b"<svg" not in data[:65_536]:
            raise MediaError(
                "not an image, or its beginning is broken: no PNG, JPEG, WebP, GIF, BMP or SVG"
            ) from None
        image = _draw_svg(data, longest)
        return image, image.size
    except Image.DecompressionBombError:
        raise MediaError(f"the image has more than {most_pixels:,} pixels") from None
    except Exception as error:  # Pillow's parsers raise whatever a broken file leads them into
        raise MediaError(f"the image is broken: {_reason(error)}") from None
    if opened.width * opened.height > most_pixels:
        raise MediaError(
            f"the image has {opened.width} x {opened.height} pixels, more than {most_pixels:,} in all"
        )
    try:
        opened.load()
        upright = ImageOps.exif_transpose(opened)
        image = _over_white(upright)
    except Exception as error:
        raise MediaError(f"the {opened.format} image is broken: {_reason(error)}") from None
    return _reduced(image, longest), image.size


def fit_image(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """uint8 [size, size, 3]: ``image`` (RGB) as large as fits, its aspect kept, in the middle of white."""
    scale = size / max(image.size)
    width, height = (max(1, min(size, round(side * scale))) for side in image.size)
    canvas = Image.new("RGB", (size, size), _WHITE)
    canvas.paste(image.resize((width, height), _FILTER), ((size - width) // 2, (size - height) // 2))
    return np.asarray(canvas, dtype=np.uint8).copy()


def encode_image(pixels_HWC: npt.NDArray[np.uint8]) -> bytes:
    """A lossless PNG of uint8 [height, width, 3]."""
    assert pixels_HWC.dtype == np.uint8 and pixels_HWC.ndim == 3 and pixels_HWC.shape[2] == 3
    stream = io.BytesIO()
    Image.fromarray(pixels_HWC).save(stream, format="PNG", compress_level=_PNG_LEVEL)
    return stream.getvalue()


def decode_pixels(png: bytes) -> npt.NDArray[np.uint8]:
    """The uint8 [height, width, 3] that ``encode_image`` was given. Raises MediaError."""
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            if image.mode != "RGB":
                raise MediaError(f"the stored image is {image.mode}, not RGB")
            return np.asarray(image, dtype=np.uint8).copy()
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"the stored image is broken: {_reason(error)}") from None


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion would clip
        return Image.fromarray(
            (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    transparent = image.convert("RGBA")
    canvas = Image.new("RGBA", transparent.size, (*_WHITE, 255))
    return Image.alpha_composite(canvas, transparent).convert("RGB")


def _reduced(image: Image.Image, longest: int) -> Image.Image:
    if max(image.size) <= longest:
        return image
    scale = longest / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), _FILTER)


def _draw_svg(data: bytes, longest: int) -> Image.Image:
    if len(data) > MOST_SVG_BYTES:
        raise MediaError(f"the SVG has {len(data):,} bytes, more than {MOST_SVG_BYTES:,}")
    try:
        text = data.decode("utf-8-sig")
        root = ElementTree.fromstring(data)
    except (UnicodeDecodeError, ElementTree.ParseError) as error:
        raise MediaError(f"the SVG is broken: {_reason(error)}") from None
    # the renderer would open files of this machine by their paths
    for element in root.iter():
        for name, value in element.attrib.items():
            target = value.strip()
            if (
                element.tag.rpartition("}")[2] in ("image", "feImage")
                and name.rpartition("}")[2] == "href"
                and target
                and not target.startswith(("data:", "#"))
            ):
                raise MediaError("the SVG refers to a file outside itself")
    try:
        # fonts differ from machine to machine, so none is used
        drawn = resvg_py.svg_to_bytes(
            svg_string=text,
            width=longest,
            height=longest,
            background="#ffffff",
            skip_system_fonts=True,
            dpi=96,
        )
        return Image.open(io.BytesIO(drawn), formats=("PNG",)).convert("RGB")
    except Exception as error:
        raise MediaError(f"the SVG cannot be drawn: {_reason(error)}") from None
    except BaseException as error:
        # a panic of the renderer's is deliberately no Exception; to us it is a broken file
        if type(error).__name__ != "PanicException":
            raise
        raise MediaError("the SVG cannot be drawn: the renderer gave up") from None


def decode_audio(data: bytes, *, rate: int, most_samples: int = MOST_AUDIO_SAMPLES) -> npt.NDArray[np.int16]:
    """int16 mono at ``rate`` Hz of an ogg, wav or flac file, its channels averaged.

    Raises MediaError, also for more than ``most_samples`` over all channels, or at ``rate``.
    """
    if not data:
        raise MediaError("the sound is empty: it has no bytes")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            given = int(file.samplerate)
            # a file says of itself what it likes: at 1 Hz some kB would become hours
            if not LOWEST_RATE <= given <= HIGHEST_RATE:
                raise MediaError(
                    f"the sound has a rate of {given:,} Hz: what is taken is {LOWEST_RATE:,} to "
                    f"{HIGHEST_RATE:,}"
                )
            if max(file.frames * file.channels, file.frames * rate // given) > most_samples:
                raise MediaError(f"the sound has more than {most_samples:,} samples")
            samples_SC = file.read(dtype="float32", always_2d=True)
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"not a sound that can be read: {_reason(error)}") from None
    if not len(samples_SC):
        raise MediaError("the sound is empty: it has no samples")
    mono = samples_SC.astype(np.float64)
    mono_S = sum(mono[:, channel] for channel in range(mono.shape[1])) / mono.shape[1]
    if not np.isfinite(mono_S).all():
        raise MediaError("the sound holds values that are no numbers")
    resampled: npt.NDArray[np.float64] = resample(np.asarray(mono_S), given, rate)
    return np.rint(np.clip(resampled, -1.0, 1.0) * 32767.0).astype(np.int16)


def encode_samples(samples: npt.NDArray[np.int16]) -> bytes:
    """int16 [samples] as a curated set holds them: little-endian PCM."""
    assert samples.dtype == np.int16 and samples.ndim == 1
    return samples.astype("<i2").tobytes()


def decode_samples(pcm: bytes) -> npt.NDArray[np.int16]:
    """The int16 [samples] that ``encode_samples`` was given."""
    return np.frombuffer(pcm, dtype="<i2").astype(np.int16)


def resample(samples: npt.NDArray[np.float64], given: int, rate: int) -> npt.NDArray[np.float64]:
    """float64 [samples] at ``given`` Hz as float64 [ceil(samples * rate / given)] at ``rate`` Hz.

    Band-limited interpolation by a windowed sinc (Smith and Gossett, "A flexible sampling-rate conversion
    method", ICASSP 1984) with a Kaiser window. Terms are added one after the other, each rounded by itself,
    so that the bits do not depend on the machine's vector units.
    """
    if given == rate or not len(samples):
        return samples
    common = math.gcd(given, rate)
    up, down = rate // common, given // common
    table_PT = _phases(up, down)
    taps = table_PT.shape[1]
    length = -(-len(samples) * up // down)
    position = np.arange(length, dtype=np.int64) * down
    phase, first = position % up, position // up
    padded = np.concatenate([np.zeros(taps // 2 - 1), samples, np.zeros(taps // 2 + 1)])
    total = np.zeros(length)
    for tap in range(taps):
        total += padded[first + tap] * table_PT[phase, tap]
    return total


@lru_cache(maxsize=32)
def _phases(up: int, down: int) -> npt.NDArray[np.float64]:
    """The filter at every offset that occurs, [up, taps]: tap ``taps // 2 - 1`` is at offset 0 and before."""
    stretch = max(1.0, down / up)  # below the lower of the two Nyquist frequencies
    half = math.ceil(_ZERO_CROSSINGS * stretch)
    offsets_PT = np.arange(-half + 1, half + 1)[None, :] - np.arange(up)[:, None] / up
    inside = np.clip(1.0 - (offsets_PT / half) ** 2, 0.0, None)
    window = np.i0(_KAISER_BETA * np.sqrt(inside)) / np.i0(_KAISER_BETA)
    table_PT = np.sinc(offsets_PT / stretch) * window
    # every phase passes a constant unchanged
    normal: npt.NDArray[np.float64] = table_PT / table_PT.sum(axis=1, keepdims=True)
    return normal


_DIRECTIONS = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF)}


def normalise_caption(text: str) -> str:
    """NFC; white space as single blanks; no control characters, byte order marks, direction overrides or
    halves of surrogate pairs. Joiners stay: several scripts are misspelt without them."""
    kept = (" " if character.isspace() else character for character in text if not _unwanted(character))
    return " ".join(unicodedata.normalize("NFC", "".join(kept)).split())


def _unwanted(character: str) -> bool:
    if character.isspace():
        return False
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS


def _reason(error: BaseException) -> str:
    """Its first line, the same in every process: libraries put in addresses of objects."""
    text = getattr(error, "error_string", None) or str(error)
    line = (str(text).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\s*<[^<>]* at 0x[0-9a-f]+>", "", line).rstrip(".")
