"""Small changes to training images, each decided by (seed, epoch, sample) alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtime.streams import stream_key

Pixels = npt.NDArray[np.uint8]

_LEVELS_L1 = np.arange(256, dtype=np.uint8)[:, None]


@dataclass(frozen=True)
class Augmentation:
    """``crop``: by how much of its side an image may be cut, ``jitter``: how far contrast and each colour may
    go (0.1 = a tenth up or down), ``flip``: whether left and right may change places (not for pictures with
    writing on them). Zero and False leave images as they are."""

    crop: float = 0.0
    jitter: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        for name, share in (("crop", self.crop), ("jitter", self.jitter)):
            if not 0.0 <= share < 1.0:
                raise ValueError(f"the data's {name} is {share}: it must be at least 0 and below 1")


def augmented(pixels_YXC: Pixels, how: Augmentation, seed: int, epoch: int, sample: int) -> Pixels:
    """uint8 [size, size, 3] of the same shape; the same bytes wherever it is called."""
    draws = np.random.Generator(np.random.Philox(stream_key("augment", seed, epoch, sample))).random(8)
    size = pixels_YXC.shape[0]
    if how.crop:
        side = size * (1.0 - how.crop * float(draws[0]))
        left, top = (float(draw) * (size - side) for draw in draws[1:3])
        cropped = Image.fromarray(pixels_YXC).resize(
            (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
        )
        pixels_YXC = np.asarray(cropped)
    if how.flip and draws[3] < 0.5:
        pixels_YXC = pixels_YXC[:, ::-1]
    if how.jitter:
        colours_C = 1.0 + how.jitter * (2.0 * draws[4:7] - 1.0)
        contrast = 1.0 + how.jitter * (2.0 * float(draws[7]) - 1.0)
        # what becomes of each of the 256 levels of a colour: far fewer than there are pixels
        levels_L1 = (_LEVELS_L1 - 127.5) * contrast + 127.5
        table_LC = np.rint(np.clip(levels_L1 * colours_C, 0.0, 255.0)).astype(np.uint8)
        pixels_YXC = np.stack([table_LC[:, c].take(pixels_YXC[:, :, c]) for c in range(3)], axis=-1)
    return np.ascontiguousarray(pixels_YXC)
