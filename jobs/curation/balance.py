"""No category and no language may outweigh the others: the most of each, picked by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping


def pick_key(seed: int, name: str) -> str:
    """Where ``name`` stands in the order that ``seed`` decides: 32 hex digits, as good as random."""
    return hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).hexdigest()


def over_quota(
    members: Iterable[tuple[str, str]], most: int, quotas: Mapping[str, int], seed: int
) -> set[str]:
    """The names to drop of ``members``, (class, name) each, so that every class keeps at most ``most`` (0:
    any number), or what ``quotas`` says for it. Which ones does not depend on the order of ``members``."""
    classes: dict[str, set[str]] = {}
    for each, name in members:
        classes.setdefault(each, set()).add(name)
    over = set()
    for each, names in classes.items():
        limit = quotas.get(each, most or len(names))
        over.update(sorted(names, key=lambda name: (pick_key(seed, name), name))[limit:])
    return over
