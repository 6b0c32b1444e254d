"""Seconds of a stage for every range of layers at once, recomputation included where memory is scarce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.search.cost import Problem, streamed_layers, timed
from strategies.search.formulas import FORMULAS
from strategies.search.recomputation import Staircases, range_index
from strategies.search.shortest import NEVER, Matrix
from strategies.search.space import Combination

Ranges = NDArray[Any]
"""One entry for each range of layers that is not empty, by first layer and then by stop."""


Tables = list[tuple[Matrix, Matrix]]


class StageTables:
    """Of one problem, in one form. What combinations, stages and lengths of the first stage share is worked
    out once.

    ``limit``: bytes a worker has (None: plenty). ``recompute``: those layers and no others; None: as needed.
    """

    def __init__(self, problem: Problem, limit: int | None, recompute: tuple[int, ...] | None) -> None:
        self._problem, self._limit, self._recompute = problem, limit, recompute
        size = problem.layers + 1
        self._first_R, self._stop_R = np.triu_indices(size, 1)
        crossing_F = np.asarray([problem.crossing_seconds(first) for first in range(size)])
        inputs_F = np.asarray([problem.input_bytes(first) for first in range(size)], dtype=np.int64)
        self._crossing_R = crossing_F[self._first_R]
        self._span_R = self._stop_R - self._first_R
        self._largest_R = _largest(problem.saved)[self._first_R, self._stop_R]
        self._widest_R: dict[int, Ranges] = {}
        self._parameters_R = self._of_ranges(problem.parameters)
        self._kept_R = self._of_ranges(problem.kept) + inputs_F[self._first_R]
        self._forward_R = self._of_ranges(problem.forward)
        self._split_R = self._of_ranges(problem.split[0]), self._of_ranges(problem.split[1])
        self._whole_R = self._of_ranges(problem.whole[0]), self._of_ranges(problem.whole[1])
        self._staircases: Staircases | None = None
        self._known: dict[tuple[object, ...], Tables] = {}
        self._of_size: dict[tuple[object, ...], Ranges] = {}
        places = np.zeros((size, size), dtype=np.int64)
        places[self._first_R, self._stop_R] = 1 + np.arange(len(self._first_R))
        self._places_FS = places.ravel()
        """Where each entry of a matrix comes from: 0 where the range is empty."""

    def seconds(self, combination: Combination, first_length: int, *, limited: bool) -> Tables:
        """(seconds added, seconds beyond) of every group's stages, [first layer, stop layer]; of at most
        ``limit`` bytes where ``limited``, if the first stage has no fewer than ``first_length`` layers."""
        by_first = FORMULAS[combination.strategy.schedule].by_first_stage
        memory = (first_length if by_first else 0,) if limited else ()
        key = (combination, memory)
        if key not in self._known:
            self._known[key] = self._timed(combination, first_length, limited=limited)
        return self._known[key]

    def least_extra(self, needed: int) -> float:
        """Forward seconds, at speed 1, in which all layers together save so many bytes per micro-batch; 0.0
        where they cannot."""
        staircase, layers = self._staircase(), self._problem.layers
        if not 0 < needed <= staircase.most(0, layers):
            return 0.0
        return staircase.least_seconds_of_all(needed)

    def recomputed(self, combination: Combination, bounds: Sequence[int]) -> tuple[int, ...] | None:
        """The layers that are computed again in the least time in which all stages fit; None: they do not."""
        if self._recompute is not None:
            return self._recompute
        layers: tuple[int, ...] = ()
        for k, (first, stop) in enumerate(pairwise(bounds)):
            held = self._problem.held(combination, k, stop - first, bounds[1])
            place = range_index(first, stop, self._problem.layers)
            size = combination.size(k)
            needed = int(self._needed(combination, [size], held, slice(place, place + 1))[0, 0])
            if needed > self._staircase().most(first, stop):
                return None
            layers += self._staircase().layers(first, stop, needed)
        return layers

    def _timed(self, combination: Combination, first_length: int, *, limited: bool) -> Tables:
        problem, strategy, pace = self._problem, combination.strategy, self._problem.speed
        held = [0] * len(combination.sizes)
        if limited:
            held = [self._held(combination, k, first_length) for k in range(len(combination.sizes))]
        # groups as large as each other whose workers keep as many micro-batches are alike
        kinds = [
            (size, k if np.ndim(each) else int(each))
            for k, (size, each) in enumerate(zip(combination.sizes, held, strict=True))
        ]
        apart = list(dict.fromkeys(kinds))
        sizes = [size for size, _ in apart]
        sizes_N1 = np.asarray(sizes)[:, None]
        extra_NR = self._settled_R[None, :]
        if limited:
            held_NR = np.empty((len(apart), len(self._span_R)), dtype=np.int64)
            for row_R, kind in zip(held_NR, apart, strict=True):
                row_R[:] = held[kinds.index(kind)]
            extra_NR = self._extra_seconds(combination, sizes, held_NR)
        inputs_R, weights_R = self._split_R if FORMULAS[strategy.schedule].splits else self._whole_R
        seconds = (self._forward_R / pace, inputs_R / pace, weights_R / pace)
        fits_NR = extra_NR < NEVER
        again_NR = np.where(fits_NR, extra_NR / pace, 0.0)
        added_NR, beyond_NR, _ = timed(problem, combination, sizes_N1, seconds, again_NR)
        beyond_NR = beyond_NR + self._by_size(self._sending_seconds, combination, sizes)
        added, beyond = (
            self._matrices(values_NR, fits_NR, len(apart))
            for values_NR in (added_NR + self._crossing_R, beyond_NR)
        )
        return [(added[place], beyond[place]) for place in map(apart.index, kinds)]

    def _by_size(
        self, of_size: Callable[[Combination, int], Ranges], combination: Combination, sizes: Sequence[int]
    ) -> Ranges:
        """[size, range]; what depends on a group's size and the strategy alone is worked out once."""
        rows = []
        for size in sizes:
            key = (of_size.__name__, combination.strategy, size)
            if key not in self._of_size:
                self._of_size[key] = of_size(combination, size)
            rows.append(self._of_size[key])
        return np.stack(rows)

    def _sending_seconds(self, combination: Combination, size: int) -> Ranges:
        chunks = combination.strategy.chunks
        sent_R: Ranges = self._problem.sent_bytes(combination, size, chunks * self._parameters_R)
        return sent_R / self._problem.costs.link_bytes_per_second

    def _matrices(self, values_NR: Ranges, usable_NR: Ranges, kinds: int) -> list[Matrix]:
        values_N1R = np.full((kinds, 1 + len(self._span_R)), NEVER)
        np.copyto(values_N1R[:, 1:], values_NR, where=usable_NR)
        size = self._problem.layers + 1
        return list(values_N1R.take(self._places_FS, axis=1).reshape(kinds, size, size))

    @property
    def _settled_R(self) -> Ranges:
        """Forward seconds of the layers that are computed again whatever the memory, at speed 1."""
        return self._of_layers(self._problem.again)

    def _of_layers(self, values: Sequence[float]) -> Ranges:
        """Sums over the layers of ``recompute``."""
        chosen = np.zeros(self._problem.layers, dtype=np.asarray(values).dtype)
        again = list(self._recompute or ())
        chosen[again] = np.asarray(values)[again]
        return self._of_ranges(np.concatenate(([0], chosen.cumsum())))

    def _extra_seconds(self, combination: Combination, sizes: Sequence[int], held: Ranges) -> Ranges:
        """Forward seconds that are computed again at speed 1; infinite where memory does not suffice."""
        if self._recompute is None:
            return self._staircase().least_seconds(self._needed(combination, sizes, held, slice(None)))
        again_R = self._of_layers([1] * self._problem.layers) > 0
        kept_R = self._kept_R - self._of_layers(self._problem.saved)
        bytes_NR = held * kept_R + self._largest_R * again_R
        return np.where(bytes_NR <= self._by_size(self._room, combination, sizes), self._settled_R, NEVER)

    def _room(self, combination: Combination, size: int) -> Ranges:
        """Bytes that parameters, sums and states leave to activations."""
        assert self._limit is not None
        parameters_R = combination.strategy.chunks * self._parameters_R
        widest_R = self._widest(streamed_layers(combination.strategy))
        room_R: Ranges = self._limit - self._problem.resident(combination, size, parameters_R, widest_R)
        return room_R

    def _widest(self, layers: int) -> Ranges:
        if layers not in self._widest_R:
            widest = _widest(self._problem.layer_parameters, layers)
            self._widest_R[layers] = widest[self._first_R, self._stop_R]
        return self._widest_R[layers]

    def _held(self, combination: Combination, k: int, first_length: int) -> Any:
        firsts_R = self._span_R if k == 0 else first_length
        return self._problem.held(combination, k, self._span_R, firsts_R)

    def _needed(
        self, combination: Combination, sizes: Sequence[int], held: Any, which: slice
    ) -> NDArray[np.int64]:
        """Bytes that must be saved per micro-batch so that ranges (``which``) fit into groups of so many
        workers, of whom each keeps ``held`` micro-batches."""
        kept_R = self._kept_R[which]
        room = self._by_size(self._room, combination, sizes)[:, which]
        needed = kept_R - (room - self._largest_R[which]) // held
        plain = held * kept_R <= room
        return np.where(plain, 0, np.maximum(needed, 1))

    def _staircase(self) -> Staircases:
        if self._staircases is None:
            self._staircases = Staircases(self._problem.saved, self._problem.again)
        return self._staircases

    def _of_ranges(self, before: Sequence[float] | NDArray[Any]) -> Ranges:
        """Sums over layers, from those over all layers before each."""
        before_L = np.asarray(before)
        ranges_R: Ranges = before_L[self._stop_R] - before_L[self._first_R]
        return ranges_R


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
