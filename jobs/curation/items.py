"""What a source gives, and what is known of it once it has been looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa


@dataclass(frozen=True)
class Unit:
    """Something to read: ``key`` is unique in its source and decides nothing but identity; ``detail`` is
    what the source needs to find it again."""

    key: str
    detail: str = ""


@dataclass(frozen=True)
class Caption:
    """``text`` as it was found, or None with the ``problem`` that kept it from being read."""

    language: str
    text: str | None
    problem: str | None = None


@dataclass(frozen=True)
class Clip:
    """Spoken words that go with the caption of the same language: a file's bytes, or a ``problem``."""

    language: str
    data: bytes | None
    problem: str | None = None


@dataclass(frozen=True)
class Item:
    """One thing with captions. ``problem`` says why nothing of it could be read; ``image`` is a file's
    bytes, or None with an ``image_problem`` if there should have been some."""

    name: str
    category: str
    image: bytes | None = None
    captions: tuple[Caption, ...] = ()
    clips: tuple[Clip, ...] = ()
    problem: str | None = None
    image_problem: str | None = None


_TEXT = pa.string()
ITEMS = pa.schema(
    [
        ("unit", _TEXT),
        ("number", pa.int64()),
        ("last", pa.bool_()),
        ("name", _TEXT),
        ("category", _TEXT),
        ("problem", _TEXT),
        ("image", pa.large_binary()),
        ("image_problem", _TEXT),
        ("captions", pa.list_(pa.struct([("language", _TEXT), ("text", _TEXT), ("problem", _TEXT)]))),
        (
            "clips",
            pa.list_(pa.struct([("language", _TEXT), ("data", pa.large_binary()), ("problem", _TEXT)])),
        ),
    ]
)
"""Items on their way to being looked at: item ``number`` of ``unit``, which may be its ``last``."""

EXAMINED = pa.schema(
    [
        ("unit", _TEXT),
        ("number", pa.int64()),
        ("last", pa.bool_()),
        ("name", _TEXT),
        ("category", _TEXT),
        ("problem", _TEXT),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image_sha256", _TEXT),
        ("image_hash", pa.binary()),
        ("image_colour", pa.binary()),
        ("image_drop", pa.struct([("filter", _TEXT), ("reason", _TEXT)])),
        (
            "captions",
            pa.list_(pa.struct([("language", _TEXT), ("text", _TEXT), ("filter", _TEXT), ("reason", _TEXT)])),
        ),
        (
            "clips",
            pa.list_(
                pa.struct(
                    [
                        ("language", _TEXT),
                        ("samples", pa.int64()),
                        ("sha256", _TEXT),
                        ("fingerprint", pa.binary()),
                        ("filter", _TEXT),
                        ("reason", _TEXT),
                    ]
                )
            ),
        ),
        ("image", pa.large_binary()),
        ("thumbnail", pa.large_binary()),
        ("sounds", pa.list_(pa.large_binary())),
    ]
)
"""Items that were looked at. The last three columns are large; ``sounds`` go with ``clips``."""

PAYLOAD = ("image", "thumbnail", "sounds")
SIGNALS = tuple(name for name in EXAMINED.names if name not in PAYLOAD)


@dataclass(frozen=True)
class Verdict:
    """Which filter drops something, and why."""

    filter: str
    reason: str


@dataclass(frozen=True)
class SeenCaption:
    language: str
    text: str
    drop: Verdict | None = None


@dataclass(frozen=True)
class SeenClip:
    """``place`` among the item's sounds."""

    language: str
    place: int
    samples: int
    sha256: str
    fingerprint: bytes
    drop: Verdict | None = None


@dataclass(frozen=True)
class Seen:
    """What decisions are made of: an item without its pixels and sounds. ``file`` and ``row`` say where
    those lie."""

    unit: str
    number: int
    name: str
    category: str
    problem: str | None
    width: int
    height: int
    image_sha256: str | None
    image_hash: bytes
    image_colour: bytes
    image_drop: Verdict | None
    captions: tuple[SeenCaption, ...]
    clips: tuple[SeenClip, ...]
    file: str = field(default="", compare=False)
    row: int = field(default=0, compare=False)


def item_table(unit: str, number: int, last: bool, item: Item) -> pa.Table:
    """One row of ITEMS."""
    row = _storable(asdict(item) | {"unit": unit, "number": number, "last": last})
    return pa.Table.from_pylist([row], schema=ITEMS)


def _storable(value: Any) -> Any:
    """Halves of surrogate pairs, which names of files and JSON can hold and UTF-8 cannot, become U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if isinstance(value, dict):
        return {key: _storable(each) for key, each in value.items()}
    return [_storable(each) for each in value] if isinstance(value, list | tuple) else value


def items_of(table: pa.Table) -> Iterable[tuple[dict[str, Any], Item]]:
    """(the row's place in its source, the item) of every row of ITEMS."""
    for row in table.to_pylist():
        place = {key: row.pop(key) for key in ("unit", "number", "last")}
        row["captions"] = tuple(Caption(**each) for each in row["captions"])
        row["clips"] = tuple(Clip(**each) for each in row["clips"])
        yield place, Item(**row)


def seen_of(table: pa.Table, file: str) -> Iterable[Seen]:
    """Every row of EXAMINED's signals, which lie in ``file``."""
    for place_in_file, row in enumerate(table.to_pylist()):
        yield Seen(
            unit=row["unit"],
            number=row["number"],
            name=row["name"],
            category=row["category"],
            problem=row["problem"],
            width=row["width"],
            height=row["height"],
            image_sha256=row["image_sha256"],
            image_hash=row["image_hash"],
            image_colour=row["image_colour"],
            image_drop=None if row["image_drop"] is None else Verdict(**row["image_drop"]),
            captions=tuple(
                SeenCaption(each["language"], each["text"], _verdict(each)) for each in row["captions"]
            ),
            clips=tuple(
                SeenClip(
                    each["language"],
                    place,
                    each["samples"],
                    each["sha256"],
                    each["fingerprint"],
                    _verdict(each),
                )
                for place, each in enumerate(row["clips"])
            ),
            file=file,
            row=place_in_file,
        )


def _verdict(row: dict[str, Any]) -> Verdict | None:
    return None if row["filter"] is None else Verdict(row["filter"], row["reason"])
