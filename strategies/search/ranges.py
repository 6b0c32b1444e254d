"""Ranges of layers, and what each has of everything whatever the memory: worked out once for all limits.

Ranges of the same layers one after the other are one, and a deep model of equal blocks has few.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.search.cost import Problem
from strategies.search.recomputation import Staircases

Ranges = NDArray[Any]
"""One entry for each range of layers that is not empty, or rather one for all that are alike."""


def ranges_of(problem: Problem, recompute: tuple[int, ...] | None) -> LayerRanges:
    """Worked out once for a problem."""
    key = LayerRanges, recompute
    if key not in problem.known:
        problem.known[key] = LayerRanges(problem, recompute)
    ranges: LayerRanges = problem.known[key]
    return ranges


class LayerRanges:
    """Of one problem, in one form. ``recompute``: those layers and no others are computed again; None: as
    needed."""

    def __init__(self, problem: Problem, recompute: tuple[int, ...] | None) -> None:
        self._problem, self.recompute = problem, recompute
        self.first_R, self.stop_R, self.places_FS = self._apart()
        """The first range of each kind, and [first layer, stop layer] -> 1 + its kind, 0 for an empty one."""
        starts = range(problem.layers)
        crossing_F = np.asarray([problem.crossing_seconds(first) for first in starts])
        inputs_F = np.asarray([problem.input_bytes(first) for first in starts], dtype=np.int64)
        self.crossing_R = crossing_F[self.first_R]
        self.span_R = self.stop_R - self.first_R
        self.parameters_R = self._sums(problem.parameters)
        self.kept_R = self._sums(problem.kept) + inputs_F[self.first_R]
        self.largest_R = _largest(problem.saved)[self.first_R, self.stop_R]
        """The most that a layer saves."""
        self._widest_R: dict[int, Ranges] = {}

    @cached_property
    def whole_R(self) -> tuple[Ranges, Ranges, Ranges]:
        """Seconds of (forward, input gradient, weight gradient) at speed 1."""
        forward, (inputs, weights) = self._problem.forward, self._problem.whole
        return self._sums(forward), self._sums(inputs), self._sums(weights)

    @cached_property
    def split_R(self) -> tuple[Ranges, Ranges, Ranges]:
        """As ``whole_R``, where backward is taken in two parts."""
        forward, (inputs, weights) = self._problem.forward, self._problem.split
        return self._sums(forward), self._sums(inputs), self._sums(weights)

    @cached_property
    def staircases(self) -> Staircases:
        ranges = list(zip(self.first_R.tolist(), self.stop_R.tolist(), strict=True))
        return Staircases(self._problem.saved, self._problem.again, ranges)

    @cached_property
    def settled_R(self) -> Ranges:
        """Forward seconds of the layers that are computed again whatever the memory, at speed 1."""
        return self._chosen(self._problem.again)

    @cached_property
    def settled_kept_R(self) -> Ranges:
        """Bytes that are kept of a micro-batch if no other layers are computed again."""
        return self.kept_R - self._chosen(self._problem.saved)

    @cached_property
    def settled_working_R(self) -> Ranges:
        """Bytes that computing those layers again takes meanwhile."""
        return self.largest_R * (self._chosen([1] * self._problem.layers) > 0)

    def widest_R(self, layers: int) -> Ranges:
        """The most parameters in so many consecutive layers."""
        if layers not in self._widest_R:
            widest = _widest(self._problem.layer_parameters, layers)
            self._widest_R[layers] = widest[self.first_R, self.stop_R]
        return self._widest_R[layers]

    def _apart(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        problem, layers = self._problem, self._problem.layers
        costs, again = problem.costs, {*(self.recompute or ())}
        kept = np.diff(problem.kept).tolist()
        of_layers = zip(
            costs.forward_seconds,
            costs.backward_seconds,
            costs.split_seconds or costs.backward_seconds,
            problem.again,
            problem.layer_parameters,
            kept,
            problem.saved,
            (layer in again for layer in range(layers)),
            strict=True,
        )
        kinds_L = _numbered(of_layers)
        into = ((problem.input_bytes(first), problem.crossing_seconds(first)) for first in range(layers))
        into_L = _numbered(into)
        # of each range the first one that is like it
        likes_FS = np.zeros((layers + 1, layers + 1), dtype=np.int64)
        alike_L = np.zeros(layers + 1, dtype=np.int64)
        for first in reversed(range(layers)):
            # how many layers are the same from here and from each layer on
            alike_L[:-1] = np.where(kinds_L == kinds_L[first], alike_L[1:] + 1, 0)
            longest = np.maximum.accumulate(np.where(into_L == into_L[first], alike_L[:-1], 0)[: first + 1])
            likes_FS[first, first + 1 :] = longest.searchsorted(np.arange(1, layers - first + 1))
        firsts_N, stops_N = np.triu_indices(layers + 1, 1)
        likes_N = likes_FS[firsts_N, stops_N]
        own_N = likes_N == firsts_N
        first_R, stop_R = firsts_N[own_N], stops_N[own_N]
        places_FS = np.zeros((layers + 1, layers + 1), dtype=np.int64)
        places_FS[first_R, stop_R] = np.arange(1, len(first_R) + 1)
        places_FS[firsts_N, stops_N] = places_FS[likes_N, likes_N + stops_N - firsts_N]
        return first_R, stop_R, places_FS

    def _chosen(self, values: Sequence[float]) -> Ranges:
        """Sums over the layers of ``recompute``."""
        chosen = np.zeros(self._problem.layers, dtype=np.asarray(values).dtype)
        again = list(self.recompute or ())
        chosen[again] = np.asarray(values)[again]
        return self._sums(np.concatenate(([0], chosen.cumsum())))

    def _sums(self, before: Sequence[float] | NDArray[Any]) -> Ranges:
        """Sums over layers, from those over all layers before each."""
        before_L = np.asarray(before)
        ranges_R: Ranges = before_L[self.stop_R] - before_L[self.first_R]
        return ranges_R


def _numbered(things: Iterable[object]) -> NDArray[np.int64]:
    """One number for those that are equal."""
    numbers: dict[object, int] = {}
    return np.asarray([numbers.setdefault(each, len(numbers)) for each in things])


def _largest(saved: Sequence[int]) -> NDArray[np.int64]:
    """The largest of a range, [first layer, stop layer]."""
    size = len(saved) + 1
    largest = np.zeros((size, size), dtype=np.int64)
    for first in range(size - 1):
        largest[first, first + 1 :] = np.maximum.accumulate(np.asarray(saved[first:], dtype=np.int64))
    return largest


def _widest(parameters: Sequence[int], layers: int) -> NDArray[np.int64]:
    """The most of a range in so many consecutive layers, [first layer, stop layer]."""
    before = np.concatenate(([0], np.cumsum(np.asarray(parameters, dtype=np.int64))))
    within = np.maximum(before[None, :] - before[:, None], 0)
    length = np.arange(len(before))[None, :] - np.arange(len(before))[:, None]
    runs = (before[layers:] - before[:-layers]).tolist()
    longer = np.zeros_like(within)
    if runs:
        longer[: len(runs) + 1, layers - 1 :] = _largest(runs)
    widest: NDArray[np.int64] = np.where(length <= layers, within, longer)
    return widest
