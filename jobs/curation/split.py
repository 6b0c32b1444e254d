"""Training and held-out rows, divided by item; items that belong together never part."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.curation.balance import pick_key
from jobs.curation.groups import Groups


def held_out_items(items: Mapping[str, str], related: Groups, share: float, seed: int) -> set[str]:
    """About ``share`` of ``items`` (name to category), and never more: whole groups of ``related``.

    A group counts to the category of its least item. The groups of each category are put in an order that
    ``seed`` decides and spread evenly from 0 to 1; then they are taken from 0 on as long as they fit, so that
    every category that is large enough is held out in proportion.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(items):
        groups.setdefault(related.least(name), []).append(name)
    categories: dict[str, list[str]] = {}
    for least, names in groups.items():
        categories.setdefault(items[names[0]], []).append(least)
    places = {}
    for leasts in categories.values():
        leasts.sort(key=lambda least: (pick_key(seed, f"split\0{least}"), least))
        for rank, least in enumerate(leasts):
            places[least] = (rank + 0.5) / len(leasts)
    room = round(share * len(items))
    chosen: set[str] = set()
    for least in sorted(groups, key=lambda least: (places[least], pick_key(seed, least), least)):
        if len(groups[least]) <= room:
            chosen.update(groups[least])
            room -= len(groups[least])
    return chosen
