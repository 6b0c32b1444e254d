"""Seconds of a stage for every range of layers at once, recomputation included where memory is scarce."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.search.cost import Problem, timed
from strategies.search.formulas import FORMULAS
from strategies.search.recomputation import Staircases, range_index
from strategies.search.shortest import NEVER, Matrix
from strategies.search.space import Combination

Ranges = NDArray[Any]
"""One entry for each range of layers that is not empty, by first layer and then by stop."""


class StageTables:
    """Of one problem. What combinations, stages and lengths of the first stage share is worked out once.

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
        self._widest_R = _widest(problem.layer_parameters)[self._first_R, self._stop_R]
        self._parameters_R = self._of_ranges(problem.parameters)
        self._kept_R = self._of_ranges(problem.kept) + inputs_F[self._first_R]
        self._forward_R = self._of_ranges(problem.forward)
        self._split_R = self._of_ranges(problem.split[0]), self._of_ranges(problem.split[1])
        self._whole_R = self._of_ranges(problem.whole[0]), self._of_ranges(problem.whole[1])
        self._staircases: Staircases | None = None
        self._seconds: dict[tuple[object, ...], tuple[Matrix, Matrix]] = {}
        self._room: dict[tuple[object, ...], Ranges] = {}
        self._extra: dict[tuple[object, ...], Ranges] = {}

    def seconds(
        self, combination: Combination, k: int, first_length: int | None, *, limited: bool
    ) -> tuple[Matrix, Matrix]:
        """(seconds added, seconds beyond) of stage ``k`` of at most ``limit`` bytes where ``limited``, if the
        first stage has no fewer than ``first_length`` layers; [first layer, stop layer]."""
        by_first = (k == 0, first_length) if FORMULAS[combination.strategy.schedule].by_first_stage else ()
        memory = (combination.sizes, k % len(combination.sizes), by_first) if limited else ()
        key = (combination.strategy, combination.size(k), memory)
        if key not in self._seconds:
            extra_R = self._extra_seconds(combination, k, first_length) if limited else self._settled_R
            self._seconds[key] = self._timed(combination, k, extra_R)
        return self._seconds[key]

    def recomputed(self, combination: Combination, bounds: Sequence[int]) -> tuple[int, ...] | None:
        """The layers that are computed again in the least time in which all stages fit; None: they do not."""
        if self._recompute is not None:
            return self._recompute
        layers: tuple[int, ...] = ()
        for k, (first, stop) in enumerate(pairwise(bounds)):
            place = range_index(first, stop, self._problem.layers)
            needed = int(self._needed(combination, k, bounds[1])[place])
            if needed > self._staircase().most(first, stop):
                return None
            layers += self._staircase().layers(first, stop, needed)
        return layers

    def _timed(self, combination: Combination, k: int, extra_R: Ranges) -> tuple[Matrix, Matrix]:
        problem, strategy, pace = self._problem, combination.strategy, self._problem.pace(combination)
        inputs_R, weights_R = self._split_R if FORMULAS[strategy.schedule].splits else self._whole_R
        seconds = (self._forward_R / pace, inputs_R / pace, weights_R / pace)
        fits_R = extra_R < NEVER
        again_R = np.where(fits_R, extra_R, 0.0)
        added_R, beyond_R, _ = timed(problem, combination, k, seconds, again_R / pace)
        sent_R = problem.sent_bytes(combination, k, strategy.chunks * self._parameters_R)
        beyond_R = beyond_R + sent_R / problem.costs.link_bytes_per_second
        return self._matrix(added_R + self._crossing_R, fits_R), self._matrix(beyond_R, fits_R)

    def _matrix(self, values_R: Ranges, usable_R: Ranges) -> Matrix:
        matrix = np.full((self._problem.layers + 1,) * 2, NEVER)
        matrix[self._first_R, self._stop_R] = np.where(usable_R, values_R, NEVER)
        return matrix

    @property
    def _settled_R(self) -> Ranges:
        """Forward seconds of the layers that are computed again whatever the memory, at speed 1."""
        return self._of_layers(self._problem.costs.forward_seconds)

    def _of_layers(self, values: Sequence[float]) -> Ranges:
        """Sums over the layers of ``recompute``."""
        chosen = np.zeros(self._problem.layers, dtype=np.asarray(values).dtype)
        again = list(self._recompute or ())
        chosen[again] = np.asarray(values)[again]
        return self._of_ranges(np.concatenate(([0], chosen.cumsum())))

    def _extra_seconds(self, combination: Combination, k: int, first_length: int | None) -> Ranges:
        """Forward seconds that are computed again at speed 1; infinite where memory does not suffice."""
        if self._recompute is not None:
            saved_R = self._of_layers(self._problem.saved)
            return np.where(saved_R >= self._needed(combination, k, first_length), self._settled_R, NEVER)
        held = self._held(combination, k, first_length)
        if np.ndim(held) > 0:
            return self._staircase().least_seconds(self._missing(combination, k, held))
        key = (self._room_key(combination, k), int(held))
        if key not in self._extra:
            self._extra[key] = self._staircase().least_seconds(self._missing(combination, k, held))
        return self._extra[key]

    def _needed(self, combination: Combination, k: int, first_length: int | None) -> Ranges:
        """Bytes that must be saved per micro-batch so that a stage fits."""
        return self._missing(combination, k, self._held(combination, k, first_length))

    def _held(self, combination: Combination, k: int, first_length: int | None) -> Any:
        firsts_R = self._span_R if k == 0 else first_length or 1
        return self._problem.held(combination, k, self._span_R, firsts_R)

    def _missing(self, combination: Combination, k: int, held: Any) -> Ranges:
        """``_needed`` where so many micro-batches are held."""
        sequence, room_R = combination.strategy.sequence, self._room_of(combination, k)
        plain_R = -(-held * self._kept_R // sequence) <= room_R
        working_R = -(-self._largest_R // sequence)
        needed_R = self._kept_R - (room_R - working_R) * sequence // held
        return np.where(plain_R, 0, np.maximum(needed_R, 1))

    def _room_key(self, combination: Combination, k: int) -> tuple[object, ...]:
        strategy, alone = combination.strategy, sum(combination.sizes) == 1
        return strategy.chunks, strategy.sharding, strategy.sequence, combination.size(k), alone

    def _room_of(self, combination: Combination, k: int) -> Ranges:
        """Bytes that parameters, sums and states leave to activations."""
        assert self._limit is not None
        key = self._room_key(combination, k)
        if key not in self._room:
            parameters_R = combination.strategy.chunks * self._parameters_R
            resident_R = self._problem.resident(combination, k, parameters_R, self._widest_R)
            self._room[key] = self._limit - resident_R
        return self._room[key]

    def _staircase(self) -> Staircases:
        if self._staircases is None:
            self._staircases = Staircases(self._problem.saved, self._problem.costs.forward_seconds)
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


def _widest(parameters: Sequence[int]) -> NDArray[np.int64]:
    """The most of a range in two consecutive layers, [first layer, stop layer]."""
    pairs = [first + second for first, second in pairwise(parameters)]
    widest = np.zeros((len(parameters) + 1, len(parameters) + 1), dtype=np.int64)
    widest[:-1, 1:] = _largest(pairs) if pairs else 0
    widest[range(len(parameters)), range(1, len(parameters) + 1)] = parameters
    return widest
