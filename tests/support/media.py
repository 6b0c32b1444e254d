"""Small images and sounds as files' bytes, drawn anew wherever a test needs them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import soundfile
from PIL import Image, ImageDraw


def picture(number: int, width: int = 96, height: int = 80) -> Image.Image:
    """A picture with edges and colours of its own for every number."""
    draws = np.random.default_rng(number)
    image = Image.new("RGB", (width, height), tuple(int(value) for value in draws.integers(120, 256, 3)))
    drawing = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = int(draws.integers(0, width - 20)), int(draws.integers(0, height - 20))
        box = (x, y, x + int(draws.integers(8, 50)), y + int(draws.integers(8, 50)))
        colour = tuple(int(value) for value in draws.integers(0, 200, 3))
        (drawing.ellipse if draws.integers(2) else drawing.rectangle)(box, fill=colour)
    return image


def image_file(image: Image.Image, form: str = "PNG", **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=form, **settings)
    return stream.getvalue()


def picture_file(number: int, width: int = 96, height: int = 80) -> bytes:
    return image_file(picture(number, width, height))


def tone(hertz: float, seconds: float = 0.5, rate: int = 16_000, loudness: float = 0.5) -> np.ndarray:
    """float32 [samples]: a tone that swells and fades."""
    time = np.arange(round(seconds * rate)) / rate
    swell = np.sin(np.pi * time / seconds)
    return (loudness * swell * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def sound_file(samples: np.ndarray, rate: int = 16_000, form: str = "WAV") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=form)
    return stream.getvalue()
