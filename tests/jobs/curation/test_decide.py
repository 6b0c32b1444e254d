"""Duplicates, balance and split: the same decision whatever the order, and what it promises holds."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from jobs.curation.balance import over_quota
from jobs.curation.decide import Decision, decide
from jobs.curation.groups import Groups
from jobs.curation.items import Seen, SeenCaption, SeenClip, Verdict
from jobs.curation.recipe import CurationRecipe
from jobs.curation.shards import shards
from jobs.curation.split import held_out_items

NUMBERS = st.integers(0, 30)
ITEMS = st.lists(
    st.builds(
        lambda name, category, image, words, clip: (name, category, image, words, clip),
        NUMBERS,
        st.sampled_from("xyz"),
        st.integers(0, 12),
        st.dictionaries(st.sampled_from(["de", "en", "fr"]), st.integers(0, 8), max_size=3),
        st.one_of(st.none(), st.integers(0, 6)),
    ),
    max_size=25,
    unique_by=lambda each: each[0],
)


def recipe(**sections: Any) -> CurationRecipe:
    values = {
        "set": {"name": "toy", "folder": "toy", "seed": 3},
        "source": {"kind": "image_folder", "path": "raw"},
    }
    return CurationRecipe.model_validate({**values, **sections})


def item(
    name: str, category: str = "x", image: int = 0, captions: Any = None, clip: int | None = None
) -> Seen:
    """Images 2n and 2n + 1 differ in one bit; clips likewise."""
    words = {"en": f"caption of {name}"} if captions is None else captions
    near = (image // 2 * 0x9E3779B97F4A7C15 % 2**64) ^ (image % 2)
    sounds = ()
    if clip is not None:
        fingerprint = ((clip // 2 + 1) * 0x9E3779B97F4A7C15**3 % 2**256) ^ (clip % 2)
        sounds = (
            SeenClip(next(iter(words), "en"), 0, 16_000, f"clip{clip}", fingerprint.to_bytes(32, "big")),
        )
    return Seen(
        unit=name,
        number=0,
        name=name,
        category=category,
        problem=None,
        width=64,
        height=64,
        image_sha256=f"image{image}",
        image_hash=near.to_bytes(8, "big"),
        image_colour=bytes(48),
        image_drop=None,
        captions=tuple(SeenCaption(language, text) for language, text in words.items()),
        clips=sounds,
    )


def built(drawn: list[Any]) -> list[Seen]:
    return [
        item(
            f"item{name:02d}",
            category,
            image,
            {code: f"words {number}" for code, number in words.items()},
            clip,
        )
        for name, category, image, words, clip in drawn
    ]


def samples(decision: Decision) -> list[str]:
    return sorted(row.sample for rows in decision.splits.values() for row in rows)


def reasons(decision: Decision) -> dict[str, tuple[str, str | None]]:
    return {each.name: (each.verdict.filter, each.like) for each in decision.dropped}


@given(ITEMS, st.randoms())
def test_order_of_arrival_does_not_matter(drawn: list[Any], random: Any) -> None:
    everything = built(drawn)
    settings = recipe(split={"held_out": 0.3}, balance={"items_per_category": 4, "rows_per_language": 9})
    decision = decide(everything, settings)
    random.shuffle(everything)
    assert decide(everything, settings) == decision


@given(ITEMS)
def test_every_row_is_kept_or_dropped_once(drawn: list[Any]) -> None:
    decision = decide(built(drawn), recipe(balance={"rows_per_language": 5}))
    dropped = [each.name for each in decision.dropped if each.what == "rows"]
    expected = [f"item{name:02d}:{code}" for name, _, _, words, _ in drawn for code in words] + [
        f"item{name:02d}" for name, _, _, words, _ in drawn if not words
    ]
    assert sorted(samples(decision) + dropped) == sorted(expected)
    assert decision.read == len(expected)


@given(ITEMS)
def test_what_is_alike_does_not_part(drawn: list[Any]) -> None:
    copies = {"image_distance": 0, "related_distance": 2, "per_caption": 3}
    split_by = {"held_out": 0.4, "captions_together": True}
    decision = decide(built(drawn), recipe(duplicates=copies, split=split_by))
    sides: dict[Any, set[str]] = {}
    for split, rows in decision.splits.items():
        for row in rows:
            assert row.seen.image_sha256 is not None
            image = int(row.seen.image_sha256.removeprefix("image")) // 2
            for key in (row.seen.name, image, (row.language, row.caption)):
                sides.setdefault(key, set()).add(split)
    assert all(len(splits) == 1 for splits in sides.values())


def test_one_spoken_name_may_be_on_both_sides_but_no_clip_is() -> None:
    everything = [item(f"item{number}", image=2 * number, clip=0) for number in range(10)]
    sizes = {
        together: [
            len(rows)
            for rows in decide(
                everything, recipe(split={"held_out": 0.2, "clips_together": together})
            ).splits.values()
        ]
        for together in (True, False)
    }
    assert sizes == {True: [10, 0], False: [8, 2]}
    decision = decide(everything, recipe(split={"held_out": 0.2, "clips_together": False}))
    assert sum(row.clip is not None for rows in decision.splits.values() for row in rows) == 1


@given(ITEMS)
def test_no_image_caption_or_clip_is_kept_twice(drawn: list[Any]) -> None:
    decision = decide(built(drawn), recipe(duplicates={"per_caption": 2}))
    rows = [row for split in decision.splits.values() for row in split]
    images = {row.seen.name: int(str(row.seen.image_sha256).removeprefix("image")) // 2 for row in rows}
    assert len(set(images.values())) == len(images)
    assert max(Counter((row.language, row.caption) for row in rows).values(), default=0) <= 2
    clips = [int(row.clip.sha256.removeprefix("clip")) // 2 for row in rows if row.clip]
    assert len(set(clips)) == len(clips)


def test_the_first_by_name_stays() -> None:
    decision = decide(
        [item("c", image=0), item("b", image=1), item("a", image=0), item("d", image=9)], recipe()
    )
    assert samples(decision) == ["a:en", "d:en"]
    assert reasons(decision) == {"b:en": ("duplicate_image", "a"), "c:en": ("duplicate_image", "a")}
    assert {each.verdict.reason for each in decision.dropped} == {"the same image", "nearly the same image"}


def test_colour_keeps_what_only_looks_alike_in_grey() -> None:
    red = replace(item("b", image=1), image_colour=bytes([99] * 48))
    assert samples(decide([item("a"), red], recipe())) == ["a:en", "b:en"]


def test_captions_alike_are_limited() -> None:
    alike = [item(name, image=2 * place, captions={"en": "A Dog."}) for place, name in enumerate("abc")]
    decision = decide(alike, recipe(duplicates={"per_caption": 2}))
    assert samples(decision) == ["a:en", "b:en"]
    assert reasons(decision) == {"c:en": ("duplicate_caption", "a:en")}


def test_copied_clip_costs_the_clip_and_not_the_row() -> None:
    decision = decide([item("a", image=0, clip=0), item("b", image=2, clip=1)], recipe())
    assert samples(decision) == ["a:en", "b:en"]
    assert reasons(decision) == {"b:en": ("duplicate_clip", "a:en")}
    assert [each.what for each in decision.dropped] == ["clips"]
    required = decide(
        [item("a", image=0, clip=0), item("b", image=2, clip=1)], recipe(clip={"required": True})
    )
    assert samples(required) == ["a:en"]


def test_clip_of_another_length_is_no_copy() -> None:
    longer = item("b", image=2, clip=1)
    longer = replace(longer, clips=(replace(longer.clips[0], samples=20_000),))
    assert decide([item("a", clip=0), longer], recipe()).dropped == ()


def test_verdicts_of_the_first_look_are_kept() -> None:
    seen = [
        replace(item("a"), problem="broken"),
        replace(item("b"), captions=()),
        replace(item("c"), image_drop=Verdict("blank", "blank")),
        replace(item("d"), captions=(SeenCaption("en", "", Verdict("caption_length", "empty")),)),
        replace(
            item("e", clip=0), clips=(replace(item("e", clip=0).clips[0], drop=Verdict("silence", "silent")),)
        ),
        item("f", image=5),
        replace(item("f", image=5), number=1),
    ]
    decision = decide(seen, recipe())
    assert {(each.name, each.verdict.filter, each.what) for each in decision.dropped} == {
        ("a", "reading", "rows"),
        ("b", "caption", "rows"),
        ("c:en", "blank", "rows"),
        ("d:en", "caption_length", "rows"),
        ("e:en", "silence", "clips"),
        ("f:en", "duplicate_name", "rows"),
    }
    assert samples(decision) == ["e:en", "f:en"]


@given(
    st.lists(st.tuples(st.sampled_from("xyz"), NUMBERS.map(str)), max_size=40),
    st.integers(0, 6),
    st.dictionaries(st.sampled_from("xyz"), st.integers(0, 6)),
    st.integers(0, 5),
)
def test_no_class_exceeds_its_quota(
    members: list[tuple[str, str]], most: int, quotas: dict[str, int], seed: int
) -> None:
    members = list({name: (each, name) for each, name in members}.values())
    over = over_quota(members, most, quotas, seed)
    assert over == over_quota(reversed(members), most, quotas, seed)
    for each in "xyz":
        names = {name for of, name in members if of == each}
        limit = quotas.get(each, most or len(names))
        assert len(names - over) == min(limit, len(names))


@given(
    st.dictionaries(NUMBERS.map(str), st.sampled_from("xyz")),
    st.lists(st.tuples(NUMBERS.map(str), NUMBERS.map(str)), max_size=15),
    st.floats(0, 0.99),
    st.integers(0, 5),
)
def test_split_keeps_groups_whole(
    items: dict[str, str], pairs: list[tuple[str, str]], share: float, seed: int
) -> None:
    groups = Groups(pairs)
    chosen = held_out_items(items, groups, share, seed)
    assert chosen <= items.keys() and len(chosen) <= round(share * len(items))
    backwards = dict(reversed(items.items()))
    assert chosen == held_out_items(backwards, Groups(reversed(pairs)), share, seed)
    rest = {groups.least(name) for name in items.keys() - chosen}
    assert not {groups.least(name) for name in chosen} & rest
    if not pairs:
        assert len(chosen) == round(share * len(items))


def test_every_category_is_held_out_in_proportion() -> None:
    items = {
        f"{category}{number}": category
        for category, count in (("x", 200), ("y", 50), ("z", 10))
        for number in range(count)
    }
    for seed in range(5):
        held_out = Counter(items[name] for name in held_out_items(items, Groups(), 0.1, seed))
        assert held_out == {"x": 20, "y": 5, "z": 1}


def test_balance_counts_items_of_a_category_and_rows_of_a_language() -> None:
    words = {"de": "eins", "en": "one"}
    seen = [
        item(
            f"{number:02d}",
            "xy"[number % 2],
            2 * number,
            {code: f"{word} {number}" for code, word in words.items()},
        )
        for number in range(20)
    ]
    decision = decide(seen, recipe(balance={"items_per_category": 6, "languages": {"de": 5}}))
    rows = [row for split in decision.splits.values() for row in split]
    assert Counter(row.language for row in rows) == {"de": 5, "en": 12}
    assert {each.verdict.reason for each in decision.dropped} == {
        "its category has enough items",
        "its language has enough rows",
    }


def test_shards_hold_all_rows_in_order() -> None:
    decision = decide(
        [item(f"{number}", image=2 * number) for number in range(11)], recipe(split={"held_out": 0.0})
    )
    planned = list(shards(decision, 4))
    assert [(split, shard.name) for split, shard in planned] == [
        ("train", "train-00000-of-00003.parquet"),
        ("train", "train-00001-of-00003.parquet"),
        ("train", "train-00002-of-00003.parquet"),
        ("held_out", "held_out-00000-of-00001.parquet"),
    ]
    rows = [row["sample"] for _, shard in planned for row in json.loads(shard.rows)]
    assert rows == [row.sample for row in decision.splits["train"]]
