"""One item looked at: decoded, checked against everything that needs no other item, resized and resampled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from jobs.curation import filters, hashes
from jobs.curation.items import EXAMINED, Clip, Item, Verdict, items_of
from jobs.curation.recipe import CurationRecipe
from jobs.data.media import (
    MediaError,
    decode_audio,
    decode_sized,
    encode_image,
    encode_samples,
    fit_image,
    normalise_caption,
)

_JUDGED_SIDE = 256
"""Blank and blurred are judged at one size, so that thresholds mean the same for every image."""
_THUMBNAIL = 96


def examine_table(items: pa.Table, recipe: CurationRecipe) -> pa.Table:
    """ITEMS to EXAMINED, row by row."""
    return pa.Table.from_pylist(
        [place | examine(item, recipe) for place, item in items_of(items)], schema=EXAMINED
    )


def examine(item: Item, recipe: CurationRecipe) -> dict[str, Any]:
    """A row of EXAMINED without its place. What cannot be kept any more is not decoded."""
    captions = [_caption(each.language, each.text, each.problem, recipe) for each in item.captions]
    row: dict[str, Any] = {
        "name": item.name,
        "category": item.category,
        "problem": item.problem,
        "width": 0,
        "height": 0,
        "image_sha256": None,
        "image_hash": b"",
        "image_colour": b"",
        "image_drop": None,
        "captions": captions,
        "clips": [],
        "image": None,
        "thumbnail": None,
        "sounds": [],
    }
    left = {each["language"] for each in captions if each["filter"] is None}
    if item.problem is not None or not left:
        return row
    row |= _image(item, recipe)
    if row["image_drop"] is None and recipe.clip.keep:
        for clip in item.clips:
            seen, sound = _clip(clip, left, recipe)
            row["clips"].append(seen)
            row["sounds"].append(sound)
    return row


def _caption(language: str, text: str | None, problem: str | None, recipe: CurationRecipe) -> dict[str, Any]:
    limits = recipe.caption
    clean = normalise_caption(text or "")
    verdict = None
    if reason := filters.language(language, limits.languages):
        verdict, clean = Verdict("language", reason), ""
    elif problem is not None:
        verdict = Verdict("reading", problem)
    elif reason := filters.encoding(clean):
        verdict = Verdict("encoding", reason)
    elif reason := filters.caption_length(clean, limits.shortest, limits.longest):
        verdict = Verdict("caption_length", reason)
    return {"language": language, "text": clean, **_shown(verdict)}


def _image(item: Item, recipe: CurationRecipe) -> dict[str, Any]:
    if item.image is None:
        if item.image_problem is None and not recipe.image.required:
            return {}
        reason = item.image_problem or "there is no image"
        return {"image_drop": _shown(Verdict("image", reason))}
    try:
        image, (width, height) = decode_sized(item.image)
    except MediaError as error:
        return {"image_drop": _shown(Verdict("image", str(error)))}
    seen: dict[str, Any] = {"width": width, "height": height}
    verdict = image_verdict(image, width, height, recipe)
    if verdict is not None:
        thumbnail = encode_image(fit_image(image, _THUMBNAIL))
        return seen | {"image_drop": _shown(verdict), "thumbnail": thumbnail}
    pixels = fit_image(image, recipe.set.image_size)
    return seen | {
        "image_sha256": hashes.digest(np.asarray(image).tobytes() + f"{image.size}".encode()),
        "image_hash": hashes.image_hash(image),
        "image_colour": hashes.image_colour(pixels),
        "image": encode_image(pixels),
    }


def image_verdict(image: Image.Image, width: int, height: int, recipe: CurationRecipe) -> Verdict | None:
    """The first of the image filters that drops it; ``width`` and ``height`` are the original's."""
    limits = recipe.image
    if reason := filters.resolution(width, height, limits.shortest_side):
        return Verdict("resolution", reason)
    if reason := filters.aspect(width, height, limits.aspect):
        return Verdict("aspect", reason)
    judged = image.copy()
    judged.thumbnail((_JUDGED_SIDE, _JUDGED_SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
    pixels = np.asarray(judged)
    if reason := filters.blank(pixels, limits.spread):
        return Verdict("blank", reason)
    if reason := filters.sharpness(pixels, limits.sharpness):
        return Verdict("sharpness", reason)
    return None


def _clip(clip: Clip, languages: set[str], recipe: CurationRecipe) -> tuple[dict[str, Any], bytes]:
    """The clip's signals and, if it is kept, its samples."""
    rate, limits = recipe.set.audio_rate, recipe.clip
    samples, verdict = None, None
    if clip.language not in languages:
        verdict = Verdict("clip", "no caption in its language")
    elif clip.data is None:
        verdict = Verdict("clip", clip.problem or "there is no sound")
    else:
        try:
            samples = decode_audio(clip.data, rate=rate)
        except MediaError as error:
            verdict = Verdict("clip", str(error))
    if samples is not None:
        if reason := filters.clip_length(len(samples), rate, limits.shortest_seconds, limits.longest_seconds):
            verdict = Verdict("clip_length", reason)
        elif reason := filters.silence(samples, limits.loudness):
            verdict = Verdict("silence", reason)
    seen = {
        "language": clip.language,
        "samples": 0 if samples is None else len(samples),
        "sha256": "",
        "fingerprint": b"",
        **_shown(verdict),
    }
    if samples is None or verdict is not None:
        return seen, b""
    sound = encode_samples(samples)
    seen |= {"sha256": hashes.digest(sound), "fingerprint": hashes.clip_fingerprint(samples, rate)}
    return seen, sound


def _shown(verdict: Verdict | None) -> dict[str, str | None]:
    return {
        "filter": None if verdict is None else verdict.filter,
        "reason": None if verdict is None else verdict.reason,
    }
