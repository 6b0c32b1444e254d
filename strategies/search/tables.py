"""Seconds of a stage for every range of layers at once, recomputation included where memory is scarce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.search.cost import Problem, streamed_layers, timed
from strategies.search.formulas import FORMULAS
from strategies.search.recomputation import Staircases
from strategies.search.shortest import NEVER, Matrix
from strategies.search.space import Combination

Ranges = NDArray[Any]
"""One entry for each range of layers that is not empty, or rather one for all that are alike in what counts:
a deep model of equal blocks has few."""


Matrices = NDArray[np.float64]
"""[table, first layer, stop layer]."""

Tables = list[tuple[Matrix, Matrix]]


@dataclass(frozen=True, slots=True)
class ManyTables:
    """Seconds added and seconds beyond of stages, infinite where they do not fit; ``rows[c]`` are the places
    of the tables of combination c's groups."""

    added_NFS: Matrices
    beyond_NFS: Matrices
    rows: Sequence[tuple[int, ...]]

    def tables(self, c: int) -> Tables:
        """One object for groups that are alike."""
        of_row = {row: (self.added_NFS[row], self.beyond_NFS[row]) for row in self.rows[c]}
        return [of_row[row] for row in self.rows[c]]


class StageTables:
    """Of one problem, in one form. What combinations, stages and lengths of the first stage share is worked
    out once.

    ``limit``: bytes a worker has (None: plenty). ``recompute``: those layers and no others; None: as needed.
    """

    def __init__(self, problem: Problem, limit: int | None, recompute: tuple[int, ...] | None) -> None:
        self._problem, self._limit, self._recompute = problem, limit, recompute
        size = problem.layers + 1
        self._first_R, self._stop_R, self._places_FS = self._apart()
        """The first range of each kind, and [first layer, stop layer] -> 1 + its kind, 0 for an empty one."""
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
        self._known: dict[tuple[object, ...], tuple[ManyTables, int]] = {}
        self._of_size: dict[object, dict[int, Ranges]] = {}

    def _apart(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Ranges of the same layers one after the other, whose sums are the same to the last bit."""
        problem, layers = self._problem, self._problem.layers
        again = {*(self._recompute or ())}
        kept = [after - before for before, after in pairwise(problem.kept)]
        alike = zip(problem.layer_parameters, kept, problem.saved, problem.again, strict=True)
        kinds = [(layer in again, *each) for layer, each in enumerate(alike)]
        firsts_R, stops_R = np.triu_indices(layers + 1, 1)
        sums_R = [
            (before[stops_R] - before[firsts_R]).tolist()
            for before in map(np.asarray, (problem.forward, *problem.split, *problem.whole))
        ]
        sums = zip(*sums_R, strict=True)
        following: dict[object, int] = {}
        """(a sequence of layers, the next layer's kind) -> a longer sequence"""
        places: dict[object, int] = {}
        places_FS = np.zeros((layers + 1, layers + 1), dtype=np.int64)
        ranges = []
        for first in range(layers):
            sequence = -1
            into = problem.input_bytes(first), problem.crossing_seconds(first)
            for stop in range(first + 1, layers + 1):
                sequence = following.setdefault((sequence, kinds[stop - 1]), len(following))
                kind = (sequence, into, next(sums))
                if kind not in places:
                    places[kind] = len(places) + 1
                    ranges.append((first, stop))
                places_FS[first, stop] = places[kind]
        first_R, stop_R = np.asarray(ranges).T
        return first_R, stop_R, places_FS

    def seconds(self, combination: Combination, first_length: int, *, limited: bool) -> Tables:
        """(seconds added, seconds beyond) of every group's stages, [first layer, stop layer]; of at most
        ``limit`` bytes where ``limited``, if the first stage has no fewer than ``first_length`` layers."""
        return self.of_many([(combination, first_length)], limited=limited).tables(0)

    def of_many(self, asked: Sequence[tuple[Combination, int]], *, limited: bool) -> ManyTables:
        """``seconds`` of several combinations and first lengths, all of which split backwards or none."""
        keys = [self._key(combination, first_length, limited=limited) for combination, first_length in asked]
        if len(keys) == 1 and keys[0] in self._known:
            many, place = self._known[keys[0]]
            return ManyTables(many.added_NFS, many.beyond_NFS, [many.rows[place]])
        many = self._timed(asked, limited=limited)
        for place, key in enumerate(keys):
            self._known.setdefault(key, (many, place))
        return many

    @staticmethod
    def _key(combination: Combination, first_length: int, *, limited: bool) -> tuple[object, ...]:
        by_first = FORMULAS[combination.strategy.schedule].by_first_stage
        return combination, (first_length if by_first else 0,) if limited else ()

    def recomputed(self, combination: Combination, bounds: Sequence[int]) -> tuple[int, ...] | None:
        """The layers that are computed again in the least time in which all stages fit; None: they do not."""
        if self._recompute is not None:
            return self._recompute
        layers: tuple[int, ...] = ()
        held_K = [
            int(self._problem.held(combination, k, stop - first, bounds[1]))
            for k, (first, stop) in enumerate(pairwise(bounds))
        ]
        room_KR = self._by_size(self._room, [(combination, combination.size(k)) for k in range(len(held_K))])
        for (first, stop), held, room_R in zip(pairwise(bounds), held_K, room_KR, strict=True):
            place = int(self._places_FS[first, stop]) - 1
            room, kept = int(room_R[place]), int(self._kept_R[place])
            needed = max(kept - (room - int(self._largest_R[place])) // held, 1) if held * kept > room else 0
            if needed > int(self._staircase().most_R[place]):
                return None
            layers += self._staircase().layers(first, stop, needed)
        return layers

    def _timed(self, asked: Sequence[tuple[Combination, int]], *, limited: bool) -> ManyTables:
        problem, pace, formula = self._problem, self._problem.speed, FORMULAS[asked[0][0].strategy.schedule]
        sized, held_NR, rows = self._groups(asked, limited=limited)
        extra_NR = self._extra_seconds(sized, held_NR) if limited else self._settled_R[None, :]
        inputs_R, weights_R = self._split_R if formula.splits else self._whole_R
        seconds = (self._forward_R / pace, inputs_R / pace, weights_R / pace)
        fits_NR = extra_NR < NEVER
        again_NR = np.where(fits_NR, extra_NR / pace, 0.0)
        chunks_N1 = np.asarray([each.strategy.chunks for each, _ in sized])[:, None]
        rounds_N1 = np.asarray([problem.rounds(each, size) for each, size in sized])[:, None]
        added_NR, beyond_NR, _ = timed(formula, chunks_N1, rounds_N1, seconds, again_NR)
        beyond_NR = beyond_NR + self._by_size(self._sending_seconds, sized)
        added_NFS, beyond_NFS = (
            self._matrices(values_NR, fits_NR, len(sized))
            for values_NR in (added_NR + self._crossing_R, beyond_NR)
        )
        return ManyTables(added_NFS, beyond_NFS, rows)

    def least_bytes(self, asked: Sequence[tuple[Combination, int]]) -> ManyTables:
        """The least bytes of a worker in place of seconds beyond, and nothing added."""
        sized, held_NR, rows = self._groups(asked, limited=True)
        kept_NR = held_NR * self._kept_R
        if self._recompute is None:  # any layer that is computed again takes as much room meanwhile
            leaner_NR = held_NR * (self._kept_R - self._staircase().most_R) + self._largest_R
            kept_NR = np.minimum(kept_NR, leaner_NR)
        else:
            kept_NR = kept_NR - held_NR * self._of_layers(self._problem.saved) + self._working_R
        bytes_NR = self._by_size(self._resident, sized) + kept_NR
        usable_NR = np.ones(bytes_NR.shape, dtype=bool)
        bytes_NFS = self._matrices(bytes_NR, usable_NR, len(sized))
        return ManyTables(np.where(bytes_NFS < NEVER, 0.0, NEVER), bytes_NFS, rows)

    def _groups(
        self, asked: Sequence[tuple[Combination, int]], *, limited: bool
    ) -> tuple[list[tuple[Combination, int]], Ranges, list[tuple[int, ...]]]:
        """(all groups that are not alike, as a combination and a size; the micro-batches that each keeps,
        [group, range], 0 where nothing is ``limited``; the places of each combination's groups in those)."""
        places: dict[object, int] = {}
        sized, held, rows = [], [], []
        for each, first_length in asked:
            row = []
            alike = _alike(each)
            for k, size in enumerate(each.sizes):
                of_group, key = self._problem.held_by_layers(each, k, first_length) if limited else (0, 0)
                kind = alike, size, key
                if kind not in places:
                    places[kind] = len(sized)
                    sized.append((each, size))
                    held.append(of_group)
                row.append(places[kind])
            rows.append(tuple(row))
        held_NL = np.zeros((len(sized), self._problem.layers), dtype=np.int64)
        for held_L, of_group in zip(held_NL, held, strict=True):
            held_L[:] = of_group
        return sized, held_NL.take(self._span_R - 1, axis=1), rows

    def _by_size(
        self,
        of_sizes: Callable[[Combination, NDArray[np.int64]], Ranges],
        sized: Sequence[tuple[Combination, int]],
    ) -> Ranges:
        """[combination and size, range]; what depends on a group's size and the strategy alone is worked out
        once."""
        keys = [((of_sizes.__name__, *_alike(each)), size) for each, size in sized]
        new: dict[tuple[object, ...], tuple[Combination, list[int]]] = {}
        for (each, _), (of_strategy, size) in zip(sized, keys, strict=True):
            if size not in self._of_size.setdefault(of_strategy, {}):
                sizes = new.setdefault(of_strategy, (each, []))[1]
                if size not in sizes:
                    sizes.append(size)
        for of_strategy, (each, sizes) in new.items():
            shape = len(sizes), len(self._span_R)  # there is what no size makes a difference to
            rows_NR = np.broadcast_to(of_sizes(each, np.asarray(sizes)[:, None]), shape)
            self._of_size[of_strategy].update(zip(sizes, rows_NR, strict=True))
        return np.stack([self._of_size[of_strategy][size] for of_strategy, size in keys])

    def _sending_seconds(self, combination: Combination, sizes_N1: NDArray[np.int64]) -> Ranges:
        chunks = combination.strategy.chunks
        sent_NR: Ranges = self._problem.sent_bytes(combination, sizes_N1, chunks * self._parameters_R)
        return sent_NR / self._problem.costs.link_bytes_per_second

    def _matrices(self, values_NR: Ranges, usable_NR: Ranges, kinds: int) -> Matrices:
        values_N1R = np.full((kinds, 1 + len(self._span_R)), NEVER)
        np.copyto(values_N1R[:, 1:], values_NR, where=usable_NR)
        return values_N1R.take(self._places_FS, axis=1)

    @cached_property
    def _settled_R(self) -> Ranges:
        """Forward seconds of the layers that are computed again whatever the memory, at speed 1."""
        return self._of_layers(self._problem.again)

    def _of_layers(self, values: Sequence[float]) -> Ranges:
        """Sums over the layers of ``recompute``."""
        chosen = np.zeros(self._problem.layers, dtype=np.asarray(values).dtype)
        again = list(self._recompute or ())
        chosen[again] = np.asarray(values)[again]
        return self._of_ranges(np.concatenate(([0], chosen.cumsum())))

    def _extra_seconds(self, sized: Sequence[tuple[Combination, int]], held: Ranges) -> Ranges:
        """Forward seconds that are computed again at speed 1; infinite where memory does not suffice."""
        room_NR = self._by_size(self._room, sized)
        if self._recompute is None:
            # so many bytes must be saved per micro-batch
            needed_NR = np.maximum(self._kept_R - (room_NR - self._largest_R) // held, 1)
            return self._staircase().least_seconds(np.where(held * self._kept_R <= room_NR, 0, needed_NR))
        kept_R = self._kept_R - self._of_layers(self._problem.saved)
        return np.where(held * kept_R + self._working_R <= room_NR, self._settled_R, NEVER)

    @cached_property
    def _working_R(self) -> Ranges:
        """Bytes that computing the layers of ``recompute`` again takes meanwhile."""
        return self._largest_R * (self._of_layers([1] * self._problem.layers) > 0)

    def _room(self, combination: Combination, sizes_N1: NDArray[np.int64]) -> Ranges:
        """Bytes that parameters, sums and states leave to activations."""
        assert self._limit is not None
        return self._limit - self._resident(combination, sizes_N1)

    def _resident(self, combination: Combination, sizes_N1: NDArray[np.int64]) -> Ranges:
        """Bytes of parameters, sums and states."""
        parameters_R = combination.strategy.chunks * self._parameters_R
        widest_R = self._widest(streamed_layers(combination.strategy))
        resident_NR: Ranges = self._problem.resident(combination, sizes_N1, parameters_R, widest_R)
        return resident_NR

    def _widest(self, layers: int) -> Ranges:
        if layers not in self._widest_R:
            widest = _widest(self._problem.layer_parameters, layers)
            self._widest_R[layers] = widest[self._first_R, self._stop_R]
        return self._widest_R[layers]

    def _staircase(self) -> Staircases:
        if self._staircases is None:
            ranges = list(zip(self._first_R.tolist(), self._stop_R.tolist(), strict=True))
            self._staircases = Staircases(self._problem.saved, self._problem.again, ranges)
        return self._staircases

    def _of_ranges(self, before: Sequence[float] | NDArray[Any]) -> Ranges:
        """Sums over layers, from those over all layers before each."""
        before_L = np.asarray(before)
        ranges_R: Ranges = before_L[self._stop_R] - before_L[self._first_R]
        return ranges_R


def _alike(combination: Combination) -> tuple[object, ...]:
    """What makes a difference to a group beside its size and what is in flight, in one form."""
    strategy = combination.strategy
    splits = FORMULAS[strategy.schedule].splits
    return splits, strategy.chunks, strategy.sharding, strategy.offload


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
