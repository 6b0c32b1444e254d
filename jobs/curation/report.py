"""The report: one HTML page on which a person sees what was kept, what was dropped, and why."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import soundfile

from jobs.curation.balance import pick_key
from jobs.curation.decide import Decision, Dropped, Row
from jobs.curation.items import Seen
from jobs.curation.manifest import FILTERS
from jobs.curation.recipe import CurationRecipe
from jobs.curation.work import Work
from jobs.data.curated import Manifest
from jobs.data.media import decode_samples

_SHOWN = 10
_KEPT_SHOWN = 24
_CLIPS_SHOWN = 6

TITLES = {
    "reading": "Readable",
    "caption": "Has a caption",
    "language": "Wanted language",
    "encoding": "Right encoding",
    "caption_length": "Caption length",
    "image": "Image decodes",
    "resolution": "Resolution",
    "aspect": "Aspect",
    "blank": "Not blank",
    "sharpness": "Sharpness",
    "duplicate_name": "Named once",
    "duplicate_image": "Image not seen before",
    "duplicate_caption": "Caption not seen before",
    "clip_required": "Has a clip",
    "balance": "Balance",
    "clip": "Clip decodes",
    "clip_length": "Clip length",
    "silence": "Not silent",
    "duplicate_clip": "Clip not heard before",
}


@dataclass(frozen=True)
class Picture:
    """``image`` is a data URI or None; ``like`` is the picture of what it is a copy of."""

    name: str
    image: str | None
    caption: str
    note: str
    language: str = ""
    sound: str | None = None
    like: str | None = None


@dataclass(frozen=True)
class Stage:
    """A filter: of ``before`` rows (or clips) it dropped ``count``."""

    name: str
    title: str
    what: str
    before: int
    count: int
    threshold: str
    reasons: tuple[tuple[str, int], ...]
    dropped: tuple[Picture, ...]
    kept: tuple[Picture, ...]


def report_page(decision: Decision, manifest: Manifest, recipe: CurationRecipe, work: Work) -> bytes:
    """The page as UTF-8. Equal for equal sets: it bears no time and no machine's name."""
    template = files("jobs.curation").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["count"] = lambda value: f"{value:,}"
    rows = [row for split in decision.splits.values() for row in split]
    album = _Album(decision, rows, recipe, work)
    return (
        environment.from_string(template)
        .render(
            manifest=manifest,
            kept=len(rows),
            items=len({row.seen.name for row in rows}),
            dropped=manifest.read - len(rows),
            seconds=sum(row.clip.samples for row in rows if row.clip) / recipe.set.audio_rate,
            stages=[stage for stage in _stages(decision, recipe, album) if stage.count],
            idle=[
                TITLES[name]
                for name in FILTERS
                if name not in {each.verdict.filter for each in decision.dropped}
            ],
            samples=album.rows(_spread(rows, recipe.set.seed), sounds=_CLIPS_SHOWN),
            categories=_shares(manifest.categories),
            languages=_shares(manifest.languages),
        )
        .encode()
    )


def _spread(rows: list[Row], seed: int) -> list[Row]:
    """A row of each of some items, categories and languages taken in turn."""
    ordered = sorted(rows, key=lambda row: pick_key(seed, f"report\0{row.sample}"))
    chosen: dict[str, Row] = {}
    categories: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    while len(chosen) < _KEPT_SHOWN:
        left = [row for row in ordered if row.seen.name not in chosen]
        if not left:
            break
        best = min(left, key=lambda row: (categories[row.seen.category], languages[row.language]))
        chosen[best.seen.name] = best
        categories[best.seen.category] += 1
        languages[best.language] += 1
    return list(chosen.values())


def _shares(counts: dict[str, dict[str, int]]) -> list[tuple[str, int, int, float]]:
    """(name, train, held out, share of the largest), the largest first."""
    names = sorted({name for split in counts.values() for name in split})
    train, held_out = counts["train"], counts["held_out"]
    table = [(name, train.get(name, 0), held_out.get(name, 0)) for name in names]
    most = max((one + other for _, one, other in table), default=1)
    return [
        (name, one, other, (one + other) / most)
        for name, one, other in sorted(table, key=lambda each: (-each[1] - each[2], each[0]))
    ]


def _stages(decision: Decision, recipe: CurationRecipe, album: _Album) -> Iterable[Stage]:
    kept_rows = sum(map(len, decision.splits.values()))
    clips_dropped = [each for each in decision.dropped if each.what == "clips"]
    clips_kept = sum(row.clip is not None for split in decision.splits.values() for row in split)
    left = {
        "rows": kept_rows + sum(each.what == "rows" for each in decision.dropped),
        "clips": clips_kept + len(clips_dropped),
    }
    thresholds = _thresholds(recipe)
    for name in FILTERS:
        here = [each for each in decision.dropped if each.verdict.filter == name]
        for what in ("rows", "clips"):
            dropped = [each for each in here if each.what == what]
            if not dropped:
                continue
            reasons = Counter(each.verdict.reason for each in dropped)
            yield Stage(
                name,
                TITLES[name],
                what,
                left[what],
                len(dropped),
                thresholds.get(name, ""),
                tuple(sorted(reasons.items(), key=lambda each: (-each[1], each[0]))),
                tuple(album.dropped(dropped)),
                tuple(album.passed(name)) if what == "rows" else (),
            )
            left[what] -= len(dropped)


def _thresholds(recipe: CurationRecipe) -> dict[str, str]:
    image, caption, clip, copies = recipe.image, recipe.caption, recipe.clip, recipe.duplicates
    return {
        "language": f"caption.languages = {', '.join(caption.languages) or 'all'}",
        "caption_length": f"caption.shortest = {caption.shortest}, caption.longest = {caption.longest}",
        "resolution": f"image.shortest_side = {image.shortest_side}",
        "aspect": f"image.aspect = {image.aspect:g}",
        "blank": f"image.spread = {image.spread:g}",
        "sharpness": f"image.sharpness = {image.sharpness:g}",
        "duplicate_image": f"duplicates.image_distance = {copies.image_distance} bits, "
        f"duplicates.image_colour = {copies.image_colour:g}",
        "duplicate_caption": f"duplicates.per_caption = {copies.per_caption}",
        "balance": f"balance.items_per_category = {recipe.balance.items_per_category}, "
        f"balance.rows_per_language = {recipe.balance.rows_per_language} (0: any number)",
        "clip_length": f"clip.shortest_seconds = {clip.shortest_seconds:g}, "
        f"clip.longest_seconds = {clip.longest_seconds:g}",
        "silence": f"clip.loudness = {clip.loudness:g} dB",
        "duplicate_clip": f"duplicates.clip_distance = {copies.clip_distance} bits",
    }


class _Album:
    """Pictures of rows, fetched from the work folder."""

    def __init__(self, decision: Decision, rows: list[Row], recipe: CurationRecipe, work: Work) -> None:
        self._work, self._seed, self._rate = work, recipe.set.seed, recipe.set.audio_rate
        self._kept = {row.seen.name: row for row in rows}
        self._seen = {each.name: each.seen for each in decision.dropped} | {
            row.sample: row.seen for row in rows
        }
        self._seen |= {seen.name: seen for seen in self._seen.values()}
        self._later = [
            (FILTERS.index(each.verdict.filter), each) for each in decision.dropped if each.what == "rows"
        ]

    def dropped(self, dropped: list[Dropped]) -> list[Picture]:
        """Of different items and reasons, as far as there are any."""
        ordered = sorted(dropped, key=lambda each: pick_key(self._seed, each.name))
        by_item = list({each.seen.name: each for each in reversed(ordered)}.values())[::-1]
        reasons: Counter[str] = Counter()
        ranked = []
        for each in by_item:
            ranked.append((reasons[each.verdict.reason], each))
            reasons[each.verdict.reason] += 1
        chosen = [each for _, each in sorted(ranked, key=lambda pair: pair[0])][:_SHOWN]
        images = self._images([each.seen for each in chosen])
        likes = self._images([self._seen[each.like] for each in chosen if each.like in self._seen])
        found = iter(likes)
        return [
            Picture(
                each.name,
                image,
                each.caption,
                each.verdict.reason,
                like=next(found) if each.like in self._seen else None,
            )
            for each, image in zip(chosen, images, strict=True)
        ]

    def passed(self, name: str) -> list[Picture]:
        """Items that went on after the filter ``name``: some of those kept, and of those dropped later."""
        later = {each.seen.name: each.seen for place, each in self._later if place > FILTERS.index(name)}
        there = {**later, **{item: row.seen for item, row in self._kept.items()}}
        chosen = sorted(there, key=lambda item: pick_key(self._seed, f"{name}\0{item}"))[:_SHOWN]
        captions = [next((each.text for each in there[item].captions if each.text), "") for item in chosen]
        images = self._images([there[item] for item in chosen])
        return [
            Picture(item, image, caption, "")
            for item, image, caption in zip(chosen, images, captions, strict=True)
        ]

    def rows(self, rows: list[Row], sounds: int) -> list[Picture]:
        places = [(row.seen.file, row.seen.row) for row in rows]
        payload = self._work.payload(places, ("image", "sounds"))
        pictures = []
        for row, place in zip(rows, places, strict=True):
            sound = None
            if row.clip is not None and sounds:
                sounds -= 1
                sound = payload[place]["sounds"][row.clip.place]
            pictures.append(
                Picture(
                    row.sample,
                    _image_uri(payload[place]["image"]),
                    row.caption,
                    row.seen.category,
                    row.language,
                    None if sound is None else _sound_uri(sound, self._rate),
                )
            )
        return pictures

    def _images(self, seen: list[Seen]) -> list[str | None]:
        places = [(each.file, each.row) for each in seen]
        payload = self._work.payload(places, ("image", "thumbnail"))
        return [_image_uri(payload[place]["image"] or payload[place]["thumbnail"]) for place in places]


def _image_uri(png: bytes | None) -> str | None:
    return None if png is None else f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _sound_uri(pcm: bytes, rate: int) -> str:
    stream: Any = io.BytesIO()
    soundfile.write(stream, decode_samples(pcm), rate, format="WAV", subtype="PCM_16")
    return f"data:audio/wav;base64,{base64.b64encode(stream.getvalue()).decode()}"
