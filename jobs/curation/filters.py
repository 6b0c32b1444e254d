"""The filters: pure functions that say why something is dropped, or None to keep it.

Every threshold comes from the recipe; a value equal to it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.int16]

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def resolution(width: int, height: int, shortest_side: int) -> str | None:
    if min(width, height) >= shortest_side:
        return None
    return f"a side is below {shortest_side} pixels"


def aspect(width: int, height: int, most: float) -> str | None:
    if max(width, height) <= most * min(width, height):
        return None
    return f"the longer side is more than {most:g} times the shorter"


def blank(pixels_HWC: Pixels, spread: float) -> str | None:
    """By the standard deviation of the grey levels, 0 to 255."""
    if float(grey(pixels_HWC).std()) >= spread:
        return None
    return f"blank: grey levels spread by less than {spread:g}"


def sharpness(pixels_HWC: Pixels, least: float) -> str | None:
    """By the variance of the Laplacian (Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy",
    ICPR 2000); an image of fewer than 3 x 3 pixels has none and is kept."""
    if min(pixels_HWC.shape[:2]) < 3 or laplacian_variance(pixels_HWC) >= least:
        return None
    return f"blurred: the Laplacian's variance is below {least:g}"


def grey(pixels_HWC: Pixels) -> npt.NDArray[np.float64]:
    # three products summed one after the other: a matrix product may round otherwise elsewhere
    red, green, blue = (pixels_HWC[..., channel] * _LUMA[channel] for channel in range(3))
    levels: npt.NDArray[np.float64] = red + green + blue
    return levels


def laplacian_variance(pixels_HWC: Pixels) -> float:
    levels = grey(pixels_HWC)
    around = levels[:-2, 1:-1] + levels[2:, 1:-1] + levels[1:-1, :-2] + levels[1:-1, 2:]
    return float((around - 4 * levels[1:-1, 1:-1]).var())


def language(code: str, wanted: Collection[str]) -> str | None:
    """Any language is kept where none is wanted in particular."""
    if not wanted or code in wanted:
        return None
    return "not a language of the recipe"


def encoding(text: str) -> str | None:
    """What a reader put in for bytes that were no text gives it away."""
    return "holds U+FFFD, the mark of a wrong encoding" if "\ufffd" in text else None


def caption_length(text: str, shortest: int, longest: int) -> str | None:
    """In characters."""
    if not text:
        return "empty"
    if len(text) < shortest:
        return f"shorter than {shortest} characters"
    if len(text) > longest:
        return f"longer than {longest} characters"
    return None


def clip_length(samples: int, rate: int, shortest_seconds: float, longest_seconds: float) -> str | None:
    seconds = samples / rate
    if seconds < shortest_seconds:
        return f"shorter than {shortest_seconds:g} s"
    if seconds > longest_seconds:
        return f"longer than {longest_seconds:g} s"
    return None


def silence(samples: Samples, least: float) -> str | None:
    """By the root mean square in dB of full scale."""
    if loudness(samples) >= least:
        return None
    return f"silent: below {least:g} dB of full scale"


def loudness(samples: Samples) -> float:
    """Root mean square in dB of full scale; minus infinity for nothing but zeros. Integers are summed, so
    that the value is exact up to the logarithm."""
    power = int(np.square(samples.astype(np.int64)).sum())
    return 10 * math.log10(power / len(samples) / 32768.0**2) if power else -math.inf
