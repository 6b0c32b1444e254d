"""Combinations whose bounds are worked out at once.

Those that differ in their ways to shard and offload alone are one family, and groups of workers that are
alike are one, whatever family has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.search.space import Combination

Values = NDArray[Any]
"""[axis of each letter]: F, parts, or families of those that differ in their way to shard and offload alone;
K, one's groups; N, groups that are alike; L, one entry for each number of layers that count, from 1; P,
places of a range."""

Part = tuple[Combination, tuple[int, int] | None]
"""All cuts of a combination, or those whose first stage has so many layers (from, to): its workers keep what
they do if it has the fewest."""

ANY, FIRST, LAST, INNER, EARLY, LATE = range(6)
"""Places of a range: wherever it is, from the first layer on, to the last one, between, wherever but to the
last one, wherever but from the first on."""


@dataclass(frozen=True, slots=True)
class Groups:
    """All groups of some parts, or families. ``layers_L``: the numbers of layers that are looked at;
    ``places_FK``: which of the N they are, N where one has fewer; ``usable_NL``: how many layers they may
    have; ``place_N``: which ranges, P. ``ways``: one combination of each way, and which of the N are its."""

    layers_L: Values
    sizes_N: Values
    chunks_N: Values
    held_NL: Values
    usable_NL: Values
    place_N: Values
    chunks_F: Values
    counts_F: Values
    places_FK: Values
    ways: Sequence[tuple[Combination, slice]] = ()

    def of(self, values_N: Values, otherwise: float) -> Values:
        """[..., F, K] of [..., N]."""
        padding = np.full((*values_N.shape[:-1], 1), otherwise, dtype=values_N.dtype)
        return np.concatenate([values_N, padding], axis=-1)[..., self.places_FK]

    def places(self, values_PL: Values) -> Values:
        """[N, L] of what goes by the place of a range, of all numbers of layers."""
        values_NL: Values = values_PL[self.place_N, : len(self.layers_L)]
        return values_NL

    def by_way(self, ways: Sequence[tuple[Combination, list[int]]]) -> Groups:
        """Of families those of each way, one behind the other: groups of two ways are not alike."""
        owns, named, numbers, start = [], [], [], 0
        for way, families in ways:
            places_FK = self.places_FK[families]
            used_N, number_N = _used(places_FK, len(self.sizes_N))
            own_N = used_N.nonzero()[0]
            named.append((way, slice(start, start + len(own_N))))
            owns.append(own_N)
            number_N[:-1] += start
            numbers.append(number_N[places_FK])
            start += len(own_N)
        places_FK = np.concatenate(numbers)
        places_FK[places_FK < 0] = start
        some_F = np.concatenate([families for _, families in ways])
        return self._taken(np.concatenate(owns), some_F, places_FK, named)

    def of_parts(self, some_F: Values) -> tuple[Groups, Values]:
        """(those of some parts alone, which of the N they are)."""
        if some_F.all():
            return self, np.arange(len(self.sizes_N))
        places_FK = self.places_FK[some_F]
        used_N, number_N = _used(places_FK, len(self.sizes_N))
        before = np.concatenate(([0], used_N.cumsum()))
        places_FK = number_N[places_FK]
        places_FK[places_FK < 0] = before[-1]
        ways = [(way, slice(int(before[some.start]), int(before[some.stop]))) for way, some in self.ways]
        ways = [(way, some) for way, some in ways if some.start < some.stop]
        return self._taken(np.flatnonzero(used_N), np.flatnonzero(some_F), places_FK, ways), used_N

    def _taken(
        self, own: Values, some: Values, places_FK: Values, ways: Sequence[tuple[Combination, slice]]
    ) -> Groups:
        """``own`` of the N, ``some`` of the F."""
        return Groups(
            self.layers_L,
            self.sizes_N[own],
            self.chunks_N[own],
            self.held_NL[own],
            self.usable_NL[own],
            self.place_N[own],
            self.chunks_F[some],
            self.counts_F[some],
            places_FK,
            ways,
        )


def _used(places_FK: Values, count: int) -> tuple[Values, Values]:
    """(which of ``count`` places are there, [place] -> its number among those, the last entry, which is no
    place, -1)."""
    used_N = np.bincount(places_FK.ravel(), minlength=count + 1)[:-1] > 0
    return used_N, np.concatenate((used_N.cumsum() - 1, [-1]))


def places_of(combination: Combination) -> list[int]:
    """Where the ranges of each group's stages are."""
    inner = len(combination.sizes) - 2
    if inner < 0:
        return [ANY]
    first, last = (EARLY, LATE) if combination.strategy.chunks > 1 else (FIRST, LAST)
    return [first, *[INNER] * inner, last]


def apart(parts: Sequence[Part]) -> tuple[list[Part], list[tuple[Combination, list[int], list[Part]]]]:
    """(one part of each family, for each way to shard and offload one combination, its families and its
    parts)."""
    families: dict[object, tuple[int, Part]] = {}
    ways: dict[object, tuple[Combination, list[int], list[Part]]] = {}
    for part in parts:
        each, lengths = part
        strategy = each.strategy
        _, places, some = ways.setdefault((strategy.sharding, strategy.offload), (each, [], []))
        family = strategy.schedule, strategy.chunks, each.sizes, lengths
        f, _ = families.setdefault(family, (len(families), part))
        places.append(f)
        some.append(part)
    return [part for _, part in families.values()], [*ways.values()]
