"""Which rows and clips stay and where they go: a pure function of what was seen, in whatever order.

What needs one item alone was judged when it was looked at (``examine``). Here is what needs the others:
duplicates, balance and the split.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from jobs.curation import hashes
from jobs.curation.balance import over_quota, pick_key
from jobs.curation.groups import Groups, Places, near_links
from jobs.curation.items import Seen, SeenClip, Verdict
from jobs.curation.recipe import CurationRecipe
from jobs.curation.split import held_out_items

_SAME_LENGTH = 0.05
"""By how much of its length a clip may differ from one that it is a copy of."""

_ROUNDING = 1e-6
"""Levels; more than the mean of 48 of them is off by."""


@dataclass(frozen=True)
class Row:
    """An item in one language. ``clip`` is the place among the item's sounds."""

    sample: str
    language: str
    caption: str
    seen: Seen
    clip: SeenClip | None


@dataclass(frozen=True)
class Dropped:
    """``like`` names what a duplicate is a copy of."""

    what: Literal["rows", "clips"]
    name: str
    verdict: Verdict
    caption: str
    seen: Seen
    like: str | None = None


@dataclass(frozen=True)
class Decision:
    """``splits`` maps a split to its rows in their final order; ``dropped`` is ordered by name."""

    read: int
    splits: dict[str, tuple[Row, ...]]
    dropped: tuple[Dropped, ...]


def decide(everything: Iterable[Seen], recipe: CurationRecipe) -> Decision:
    everything = sorted(everything, key=lambda seen: (seen.name, seen.unit, seen.number))
    rows, dropped = _judged(everything)
    read = len(rows) + sum(each.what == "rows" for each in dropped)
    rows, groups = _without_image_copies(rows, recipe, dropped)
    rows = _without_caption_copies(rows, recipe, dropped)
    rows, clip_groups = _without_clip_copies(rows, recipe, dropped)
    if recipe.clip.required:
        without = Verdict("clip_required", "no clip is left for it")
        dropped += [_drop(row, without) for row in rows if row.clip is None]
        rows = [row for row in rows if row.clip is not None]
    rows = _balanced(rows, recipe, dropped)
    seed = recipe.set.seed
    related = _related(rows, groups, clip_groups, recipe)
    held_out = held_out_items(
        {row.seen.name: row.seen.category for row in rows}, related, recipe.split.held_out, seed
    )
    rows.sort(key=lambda row: (pick_key(seed, row.seen.name), row.sample))
    return Decision(
        read,
        {
            "train": tuple(row for row in rows if row.seen.name not in held_out),
            "held_out": tuple(row for row in rows if row.seen.name in held_out),
        },
        tuple(sorted(dropped, key=lambda each: (each.what, each.name, each.verdict.filter))),
    )


def _drop(row: Row, verdict: Verdict, like: str | None = None) -> Dropped:
    return Dropped("rows", row.sample, verdict, row.caption, row.seen, like)


def _judged(everything: list[Seen]) -> tuple[list[Row], list[Dropped]]:
    """Every row, or why it was dropped when it was looked at."""
    rows: dict[str, Row] = {}
    dropped: list[Dropped] = []
    for seen in everything:
        if seen.problem is not None or not seen.captions:
            verdict = (
                Verdict("caption", "there is no caption")
                if seen.problem is None
                else Verdict("reading", seen.problem)
            )
            dropped.append(Dropped("rows", seen.name, verdict, "", seen))
            continue
        clips: dict[str, SeenClip] = {}
        for clip in seen.clips:
            clip_verdict = clip.drop
            if clip_verdict is None and clip.language in clips:
                clip_verdict = Verdict("clip", "a second clip in its language")
            if clip_verdict is None:
                clips[clip.language] = clip
            else:
                dropped.append(Dropped("clips", f"{seen.name}:{clip.language}", clip_verdict, "", seen))
        for caption in seen.captions:
            row = Row(
                f"{seen.name}:{caption.language}",
                caption.language,
                caption.text,
                seen,
                clips.get(caption.language),
            )
            row_verdict = caption.drop or seen.image_drop
            if row_verdict is None and row.sample in rows:
                row_verdict = Verdict("duplicate_name", "another row of that item in that language")
            if row_verdict is None:
                rows[row.sample] = row
            else:
                dropped.append(_drop(row, row_verdict))
    return list(rows.values()), dropped


def _without_image_copies(
    rows: list[Row], recipe: CurationRecipe, dropped: list[Dropped]
) -> tuple[list[Row], Groups]:
    """The rows whose image is the first of its kind by name; and the groups of related images' items."""
    images: dict[str, Seen] = {}
    for row in rows:
        if row.seen.image_sha256 is not None:
            images.setdefault(row.seen.name, row.seen)
    first: dict[str, str] = {}
    same = Groups()
    for name in sorted(images):
        digest = images[name].image_sha256
        assert digest is not None
        same.join(name, first.setdefault(digest, name))
    firsts = {name: images[name].image_hash for name in first.values()}
    limits = recipe.duplicates

    levels_NC = hashes.colour_levels(images[name].image_colour for name in sorted(firsts))
    means_N = levels_NC.mean(axis=1)

    def close(one: int, others: Places) -> npt.NDArray[np.bool_]:
        # no less apart than their means are, which is quick to say of many
        near: npt.NDArray[np.bool_] = (
            np.abs(means_N[others] - means_N[one]) <= limits.image_colour + _ROUNDING
        )
        candidates = others[near]
        near[near] = hashes.colour_distances(levels_NC[one], levels_NC[candidates]) <= limits.image_colour
        return near

    related = Groups((name, same.least(name)) for name in images)
    for one, other in near_links(firsts, limits.related_distance):
        related.join(one, other)
    for one, other in near_links(firsts, limits.image_distance, close):
        same.join(one, other)
    kept = []
    for row in rows:
        name = row.seen.name
        original = same.least(name)
        if original == name:
            kept.append(row)
            continue
        exact = images[original].image_sha256 == images[name].image_sha256
        verdict = Verdict("duplicate_image", "the same image" if exact else "nearly the same image")
        dropped.append(_drop(row, verdict, original))
    return kept, related


def _without_caption_copies(rows: list[Row], recipe: CurationRecipe, dropped: list[Dropped]) -> list[Row]:
    first: dict[tuple[str, str], list[str]] = {}
    kept = []
    for row in sorted(rows, key=lambda row: row.sample):
        alike = first.setdefault((row.language, hashes.caption_key(row.caption)), [])
        if len(alike) < recipe.duplicates.per_caption:
            alike.append(row.sample)
            kept.append(row)
        else:
            dropped.append(_drop(row, Verdict("duplicate_caption", "the same caption"), alike[0]))
    return kept


def _without_clip_copies(
    rows: list[Row], recipe: CurationRecipe, dropped: list[Dropped]
) -> tuple[list[Row], Groups]:
    """The same rows, each clip with the first row by name that has it; and the groups of items that share
    one."""
    items = {row.sample: row.seen.name for row in rows}
    clips = {row.sample: row.clip for row in rows if row.clip is not None}
    first: dict[str, str] = {}
    same = Groups((name, first.setdefault(clips[name].sha256, name)) for name in sorted(clips))

    firsts = {name: clips[name].fingerprint for name in first.values()}
    lengths_N = np.asarray([clips[name].samples for name in sorted(firsts)], dtype=np.int64)

    def close(one: int, others: Places) -> npt.NDArray[np.bool_]:
        longer = np.maximum(lengths_N[one], lengths_N[others])
        near: npt.NDArray[np.bool_] = np.abs(lengths_N[others] - lengths_N[one]) <= _SAME_LENGTH * longer
        return near

    for one, other in near_links(firsts, recipe.duplicates.clip_distance, close):
        same.join(one, other)
    shared = Groups((items[name], items[same.least(name)]) for name in clips)
    kept = []
    for row in rows:
        original = same.least(row.sample)
        if row.clip is not None and original != row.sample:
            exact = clips[original].sha256 == row.clip.sha256
            verdict = Verdict("duplicate_clip", "the same clip" if exact else "nearly the same clip")
            dropped.append(Dropped("clips", row.sample, verdict, row.caption, row.seen, original))
            row = replace(row, clip=None)
        kept.append(row)
    return kept, shared


def _balanced(rows: list[Row], recipe: CurationRecipe, dropped: list[Dropped]) -> list[Row]:
    limits, seed = recipe.balance, recipe.set.seed
    items = over_quota(
        ((row.seen.category, row.seen.name) for row in rows),
        limits.items_per_category,
        limits.categories,
        seed,
    )
    left = [row for row in rows if row.seen.name not in items]
    samples = over_quota(
        ((row.language, row.sample) for row in left), limits.rows_per_language, limits.languages, seed
    )
    for row in rows:
        if row.seen.name in items:
            dropped.append(_drop(row, Verdict("balance", "its category has enough items")))
        elif row.sample in samples:
            dropped.append(_drop(row, Verdict("balance", "its language has enough rows")))
    return [row for row in left if row.sample not in samples]


def _related(rows: list[Row], images: Groups, clips: Groups, recipe: CurationRecipe) -> Groups:
    """Items that must not part: images alike; a clip or a caption in common where the recipe says so."""
    related = Groups()
    captions: dict[tuple[str, str], str] = {}
    for row in rows:
        name = row.seen.name
        related.join(name, images.least(name))
        if recipe.split.captions_together:
            related.join(name, captions.setdefault((row.language, hashes.caption_key(row.caption)), name))
        if recipe.split.clips_together:
            related.join(name, clips.least(name))
    return related
