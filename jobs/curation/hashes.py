"""What makes two images, captions or clips the same, or nearly so: hashes that can be compared."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

import imagehash
import numpy as np
import numpy.typing as npt
from PIL import Image

_COLOUR_GRID = 4
_BANDS, _SLICES = 16, 16
_FLOOR, _CHANGE = 1e-3, 0.1
_LEAST_HERTZ, _MOST_HERTZ = 200.0, 3_400.0  # what a telephone passes of speech


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def image_hash(image: Image.Image) -> bytes:
    """64 bits: the signs of the low frequencies of the grey image (pHash, Zauner 2010)."""
    return np.packbits(imagehash.phash(image).hash.ravel()).tobytes()


def image_colour(pixels_HWC: npt.NDArray[np.uint8]) -> bytes:
    """The mean colours of a 4 x 4 grid, 48 bytes: what the hash of a grey image does not tell."""
    image = Image.fromarray(pixels_HWC).resize((_COLOUR_GRID, _COLOUR_GRID), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.uint8).tobytes()


def colour_levels(colours: Iterable[bytes]) -> npt.NDArray[np.int16]:
    """The levels of N images, [N, 48]."""
    return np.frombuffer(b"".join(colours), np.uint8).reshape(-1, 3 * _COLOUR_GRID**2).astype(np.int16)


def colour_distances(
    one_C: npt.NDArray[np.int16], others_NC: npt.NDArray[np.int16]
) -> npt.NDArray[np.float64]:
    """The mean difference of levels of one image to each of N, 0 to 255."""
    distances_N: npt.NDArray[np.float64] = np.abs(others_NC - one_C).mean(axis=1)
    return distances_N


def caption_key(text: str) -> str:
    """Equal for captions that differ only in case, compatibility forms, punctuation and blanks."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = (character if unicodedata.category(character)[0] in "LMNS" else " " for character in folded)
    return " ".join("".join(kept).split()) or text


def clip_fingerprint(samples: npt.NDArray[np.int16], rate: int) -> bytes:
    """256 bits: the signs of how energy differs between neighbours in pitch and time (Haitsma and Kalker,
    "A highly robust audio fingerprinting system", ISMIR 2002), with the whole clip cut into 17 slices, so
    that it also matches at another length of silence between its words."""
    edges = np.linspace(0, len(samples), _SLICES + 2).astype(int)
    width = 1 << max(5, int(np.ceil(np.log2(max(2, np.diff(edges).max())))))
    hertz = np.fft.rfftfreq(width, 1 / rate)
    borders = np.geomspace(_LEAST_HERTZ, min(_MOST_HERTZ, rate / 2), _BANDS + 2)
    energy = np.zeros((_SLICES + 1, _BANDS + 1))
    for number in range(_SLICES + 1):
        piece = samples[edges[number] : edges[number + 1]].astype(np.float64)
        power = (
            np.abs(np.fft.rfft(piece * np.hanning(len(piece) + 2)[1:-1], width)) ** 2 if len(piece) else None
        )
        if power is not None:
            sums = np.concatenate([[0.0], np.cumsum(power)])
            places = np.searchsorted(hertz, borders)
            energy[number] = sums[places[1:]] - sums[places[:-1]]
    # relative to the clip's own loudness, and deaf to what is hardly there
    level = np.log(energy + _FLOOR * energy.mean() + np.finfo(np.float64).tiny)
    between = np.diff(level, axis=1)
    bits = (between[1:] - between[:-1]) > _CHANGE
    return np.packbits(bits.ravel()).tobytes()


def bit_distance(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()
