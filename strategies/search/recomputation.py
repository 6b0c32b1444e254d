"""Which layers of a range to compute again so that enough bytes are saved in the least time: a knapsack.

Galvatron (Miao et al., VLDB'23, sec. 4) runs its dynamic programme over layers and integer memory. Here a
range's whole staircase of (bytes saved, seconds added) is kept, since it serves every schedule, sharding
and number of stages; layers that are alike share it, so that a deep model of equal blocks has few.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

FINEST = 1024
"""Into how many units at least the largest saving is divided: a staircase has no more steps than about this
many times the layers, however odd their sizes. Bytes are exact as long as they are fewer."""

Staircase = tuple[tuple[int, float], ...]
"""(bytes saved per micro-batch, seconds added), both ascending, none better than another."""


class Staircases:
    """Of ``ranges`` of layers, (first, stop). ``saved`` and ``seconds`` have one entry a layer."""

    def __init__(
        self, saved: Sequence[int], seconds: Sequence[float], ranges: Sequence[tuple[int, int]]
    ) -> None:
        unit = max(sum(saved) // (FINEST * max(len(saved), 1)), 1)
        self._saved = [each // unit * unit for each in saved]
        self._seconds = list(seconds)
        classes = {pair: None for pair in zip(self._saved, self._seconds, strict=True) if pair[0] > 0}
        self._kinds = tuple(classes)
        self._unit = unit
        layers = list(zip(self._saved, self._seconds, strict=True))
        before = [[0, *accumulate(layer == kind for layer in layers)] for kind in self._kinds]
        of_range = [
            _steps(self._kinds, tuple(each[stop] - each[first] for each in before)) for first, stop in ranges
        ]
        # all staircases one behind the other, and after what of each range there is a step of the next
        self.most_R: NDArray[np.int64] = np.asarray([saved[-1] for saved, _ in of_range], dtype=np.int64)
        """Bytes per micro-batch that all layers of each range save."""
        self._apart = int(self.most_R.max()) // unit + 1
        self._before_R = np.arange(len(of_range)) * self._apart
        self._ends_N: NDArray[np.int64] = np.concatenate([saved for saved, _ in of_range]) // unit
        self._ends_N += np.repeat(self._before_R, [len(saved) for saved, _ in of_range])
        self._seconds_N = np.concatenate([seconds for _, seconds in of_range])

    def least_seconds(self, needed_R: NDArray[np.int64]) -> NDArray[np.float64]:
        """The least seconds in which so many bytes are saved per micro-batch, for every range (and for many
        at once); infinite where not even all of its layers save as much."""
        can_R = needed_R <= self.most_R
        units_R = np.where(can_R, needed_R, 0)
        if self._unit > 1:
            units_R = -(-units_R // self._unit)
        seconds_R: NDArray[np.float64] = self._seconds_N[self._ends_N.searchsorted(self._before_R + units_R)]
        return np.where(can_R, seconds_R, np.inf)

    def layers(self, first: int, stop: int, needed: int) -> tuple[int, ...]:
        """The layers, ascending, that save at least ``needed`` bytes in ``least_seconds``; among layers that
        are alike the first ones."""
        if needed <= 0:
            return ()
        counts = [0] * len(self._kinds)
        of_kind: list[list[int]] = [[] for _ in self._kinds]
        for layer in range(first, stop):
            pair = (self._saved[layer], self._seconds[layer])
            if pair in self._kinds:
                kind = self._kinds.index(pair)
                counts[kind] += 1
                of_kind[kind].append(layer)
        chosen: list[int] = []
        for kind in reversed(range(len(self._kinds))):
            # how many of this kind go with the best of the kinds before it
            before = _staircase(self._kinds, (*counts[:kind], *[0] * (len(counts) - kind)))
            saved, seconds = self._kinds[kind]
            options = []
            for count in range(counts[kind] + 1):
                place = bisect_left(before, max(needed - count * saved, 0), key=lambda step: step[0])
                if place < len(before):
                    options.append((before[place][1] + count * seconds, count))
            assert options, "asked for what least_seconds says cannot be saved"
            count = min(options)[1]
            chosen += of_kind[kind][:count]
            needed -= count * saved
        return tuple(sorted(chosen))


@lru_cache(maxsize=4096)
def _steps(
    kinds: tuple[tuple[int, float], ...], counts: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """``_staircase`` as (bytes, seconds)."""
    saved, seconds = zip(*_staircase(kinds, counts), strict=True)
    return np.asarray(saved, dtype=np.int64), np.asarray(seconds)


@lru_cache(maxsize=4096)
def _staircase(kinds: tuple[tuple[int, float], ...], counts: tuple[int, ...]) -> Staircase:
    """Of ``counts[i]`` layers of each kind i: (bytes, seconds) of a layer."""
    last = max((kind for kind, count in enumerate(counts) if count), default=None)
    if last is None:
        return ((0, 0.0),)
    saved, seconds = kinds[last]
    fewer = _staircase(kinds, (*counts[:last], 0, *counts[last + 1 :]))
    steps = sorted(
        (-s - count * saved, each + count * seconds) for s, each in fewer for count in range(counts[last] + 1)
    )
    kept: list[tuple[int, float]] = []
    for negative, each in steps:  # from the most bytes down: only what takes less is worth a step
        if not kept or each < kept[-1][1]:
            kept.append((-negative, each))
    return tuple(reversed(kept))
