"""Which things belong together: links between near hashes, and the groups that pairs make."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from jobs.curation.hashes import bit_distance

Name = TypeVar("Name", bound=Hashable)
Places = npt.NDArray[np.int64]


class Groups:
    """Connected groups of names (union-find). The outcome does not depend on the order of the pairs."""

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self._parents: dict[str, str] = {}
        for one, other in pairs:
            self.join(one, other)

    def join(self, one: str, other: str) -> None:
        first, second = sorted((self.least(one), self.least(other)))
        self._parents[second] = first

    def least(self, name: str) -> str:
        """The least name of the group that ``name`` is in: itself, if it is in none."""
        path = []
        while (parent := self._parents.get(name, name)) != name:
            path.append(name)
            name = parent
        for each in path:
            self._parents[each] = name
        return name


Close = Callable[[int, Places], npt.NDArray[np.bool_]]
"""Which of the names at the given places, in the order of names, are close to the one at the first place."""


def near_links(
    hashes: Mapping[str, bytes], distance: int, close: Close | None = None
) -> Iterator[tuple[str, str]]:
    """Pairs of names whose hashes differ in at most ``distance`` bits and that ``close`` (None: all) agrees
    to: as few as make the groups that all such pairs make. Thousands of names may have one hash.

    Cut into distance + 1 parts, two such hashes have at least one part in common (the pigeonhole principle;
    Manku et al., "Detecting near-duplicates for web crawling", WWW 2007): only these are compared.
    """
    names = sorted(hashes)
    places: dict[bytes, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(hashes[name], []).append(place)
    waiting = {value: np.asarray(each) for value, each in places.items()}  # those that no link leads to yet
    buckets: dict[tuple[int, int], list[bytes]] = {}
    for value in waiting:
        for part in _parts(value, distance + 1):
            buckets.setdefault(part, []).append(value)
    near: dict[bytes, list[bytes]] = {}

    def around(value: bytes) -> list[bytes]:
        if value not in near:
            found: dict[bytes, None] = {}
            for part in _parts(value, distance + 1):
                buckets[part] = [each for each in buckets[part] if len(waiting[each])]
                found.update(dict.fromkeys(buckets[part]))
            near[value] = [each for each in found if bit_distance(value, each) <= distance]
        return near[value]

    for first, name in enumerate(names):
        own = waiting[hashes[name]]
        if not len(own) or own[0] != first:  # a link leads to it
            continue
        waiting[hashes[name]] = own[1:]
        reached = [first]
        while reached:
            one = reached.pop()
            for value in around(hashes[names[one]]):
                others = waiting[value]
                if not len(others):
                    continue
                agreed = np.ones(len(others), dtype=np.bool_) if close is None else close(one, others)
                waiting[value] = others[~agreed]
                for other in others[agreed].tolist():
                    yield names[one], names[other]
                    reached.append(other)


def _parts(value: bytes, count: int) -> Iterator[tuple[int, int]]:
    """(number of the part, its bits)."""
    bits, number = len(value) * 8, int.from_bytes(value, "big")
    edges = [bits * part // count for part in range(count + 1)]
    for part, (low, high) in enumerate(pairwise(edges)):
        yield part, (number >> low) & ((1 << (high - low)) - 1)
