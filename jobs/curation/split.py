"""Training and held-out rows, divided by item; items that belong together never part."""

from __future__ import annotations

from collections.abc import Iterable

from jobs.curation.balance import pick_key
from jobs.curation.groups import Groups


def held_out_items(items: Iterable[str], related: Groups, share: float, seed: int) -> set[str]:
    """About ``share`` of ``items``, and never more: whole groups of ``related``, in an order decided by
    ``seed``, as long as they fit."""
    groups: dict[str, list[str]] = {}
    for name in sorted(set(items)):
        groups.setdefault(related.least(name), []).append(name)
    room = round(share * sum(map(len, groups.values())))
    chosen: set[str] = set()
    for name in sorted(groups, key=lambda name: (pick_key(seed, f"split\0{name}"), name)):
        if len(groups[name]) <= room:
            chosen.update(groups[name])
            room -= len(groups[name])
    return chosen
