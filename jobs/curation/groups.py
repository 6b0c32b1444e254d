"""Which things belong together: pairs of near hashes, and the groups that pairs make."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import combinations, pairwise
from typing import TypeVar

from jobs.curation.hashes import bit_distance

Name = TypeVar("Name", bound=Hashable)


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


def near_pairs(
    hashes: Mapping[str, bytes], distance: int, close: Callable[[str, str], bool] = lambda one, other: True
) -> Iterator[tuple[str, str]]:
    """Every pair of names whose hashes differ in at most ``distance`` bits and that ``close`` agrees to.

    Cut into distance + 1 parts, two such hashes have at least one part in common (the pigeonhole principle;
    Manku et al., "Detecting near-duplicates for web crawling", WWW 2007): only these are compared.
    """
    buckets: dict[tuple[int, int], list[str]] = {}
    for name in sorted(hashes):
        for part, value in enumerate(_parts(hashes[name], distance + 1)):
            buckets.setdefault((part, value), []).append(name)
    seen = set()
    for names in buckets.values():
        for pair in combinations(names, 2):
            if pair in seen or bit_distance(hashes[pair[0]], hashes[pair[1]]) > distance:
                continue
            seen.add(pair)
            if close(*pair):
                yield pair


def _parts(value: bytes, count: int) -> Iterator[int]:
    bits, number = len(value) * 8, int.from_bytes(value, "big")
    edges = [bits * part // count for part in range(count + 1)]
    for low, high in pairwise(edges):
        yield (number >> low) & ((1 << (high - low)) - 1)
