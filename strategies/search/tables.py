"""Seconds of a stage for every range of layers at once, recomputation included where memory is scarce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from strategies.search.cost import Problem, streamed_layers, timed
from strategies.search.formulas import FORMULAS
from strategies.search.ranges import Ranges, ranges_of
from strategies.search.shortest import NEVER, Matrix
from strategies.search.space import Combination

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
        self._problem, self._limit, self._ranges = problem, limit, ranges_of(problem, recompute)
        self._known: dict[tuple[object, ...], tuple[ManyTables, int]] = {}
        self._of_size: dict[object, dict[int, Ranges]] = {}

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

    def prepare(self, asked: Sequence[tuple[Combination, int]]) -> None:
        """Works out limited ``seconds`` of several combinations and first lengths at once."""
        new = [each for each in asked if self._key(*each, limited=True) not in self._known]
        for splits in (False, True):
            some = [each for each in new if FORMULAS[each[0].strategy.schedule].splits == splits]
            if some:
                self.of_many(some, limited=True)

    @staticmethod
    def _key(combination: Combination, first_length: int, *, limited: bool) -> tuple[object, ...]:
        by_first = FORMULAS[combination.strategy.schedule].by_first_stage
        return combination, (first_length if by_first else 0,) if limited else ()

    def recomputed(self, combination: Combination, bounds: Sequence[int]) -> tuple[int, ...] | None:
        """The layers that are computed again in the least time in which all stages fit; None: they do not."""
        ranges = self._ranges
        if ranges.recompute is not None:
            return ranges.recompute
        layers: tuple[int, ...] = ()
        held_K = [
            int(self._problem.held(combination, k, stop - first, bounds[1]))
            for k, (first, stop) in enumerate(pairwise(bounds))
        ]
        room_KR = self._by_size(self._room, [(combination, combination.size(k)) for k in range(len(held_K))])
        for (first, stop), held, room_R in zip(pairwise(bounds), held_K, room_KR, strict=True):
            place = int(ranges.places_FS[first, stop]) - 1
            room, kept = int(room_R[place]), int(ranges.kept_R[place])
            needed = max(kept - (room - int(ranges.largest_R[place])) // held, 1) if held * kept > room else 0
            if needed > int(ranges.staircases.most_R[place]):
                return None
            layers += ranges.staircases.layers(first, stop, needed)
        return layers

    def _timed(self, asked: Sequence[tuple[Combination, int]], *, limited: bool) -> ManyTables:
        problem, pace, formula = self._problem, self._problem.speed, FORMULAS[asked[0][0].strategy.schedule]
        sized, held_NR, rows = self._groups(asked, limited=limited)
        extra_NR = self._extra_seconds(sized, held_NR) if limited else self._ranges.settled_R[None, :]
        forward_R, inputs_R, weights_R = self._ranges.split_R if formula.splits else self._ranges.whole_R
        seconds = (forward_R / pace, inputs_R / pace, weights_R / pace)
        fits_NR = extra_NR < NEVER
        again_NR = np.where(fits_NR, extra_NR / pace, 0.0)
        chunks_N1 = np.asarray([each.strategy.chunks for each, _ in sized])[:, None]
        rounds_N1 = np.asarray([problem.rounds(each, size) for each, size in sized])[:, None]
        added_NR, beyond_NR, _ = timed(formula, chunks_N1, rounds_N1, seconds, again_NR)
        beyond_NR = beyond_NR + self._by_size(self._sending_seconds, sized)
        added_NFS, beyond_NFS = (
            self._matrices(values_NR, fits_NR, len(sized))
            for values_NR in (added_NR + self._ranges.crossing_R, beyond_NR)
        )
        return ManyTables(added_NFS, beyond_NFS, rows)

    def least_bytes(self, asked: Sequence[tuple[Combination, int]]) -> ManyTables:
        """The least bytes of a worker in place of seconds beyond, and nothing added."""
        ranges = self._ranges
        sized, held_NR, rows = self._groups(asked, limited=True)
        if ranges.recompute is None:  # any layer that is computed again takes as much room meanwhile
            leaner_NR = held_NR * (ranges.kept_R - ranges.staircases.most_R) + ranges.largest_R
            kept_NR = np.minimum(held_NR * ranges.kept_R, leaner_NR)
        else:
            kept_NR = held_NR * ranges.settled_kept_R + ranges.settled_working_R
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
        sized: list[tuple[Combination, int]] = []
        held, rows = [], []
        for each, first_length in asked:
            row = []
            alike = _alike(each)
            nothing = ((0, 0),) * len(each.sizes)
            in_flight = self._problem.held_by_layers(each, first_length) if limited else nothing
            for size, (of_group, key) in zip(each.sizes, in_flight, strict=True):
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
        return sized, held_NL.take(self._ranges.span_R - 1, axis=1), rows

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
            shape = len(sizes), len(self._ranges.span_R)  # there is what no size makes a difference to
            rows_NR = np.broadcast_to(of_sizes(each, np.asarray(sizes)[:, None]), shape)
            self._of_size[of_strategy].update(zip(sizes, rows_NR, strict=True))
        return np.stack([self._of_size[of_strategy][size] for of_strategy, size in keys])

    def _sending_seconds(self, combination: Combination, sizes_N1: NDArray[np.int64]) -> Ranges:
        chunks = combination.strategy.chunks
        sent_NR: Ranges = self._problem.sent_bytes(combination, sizes_N1, chunks * self._ranges.parameters_R)
        return sent_NR / self._problem.costs.link_bytes_per_second

    def _matrices(self, values_NR: Ranges, usable_NR: Ranges, kinds: int) -> Matrices:
        values_N1R = np.full((kinds, 1 + len(self._ranges.span_R)), NEVER)
        np.copyto(values_N1R[:, 1:], values_NR, where=usable_NR)
        return values_N1R.take(self._ranges.places_FS, axis=1)

    def _extra_seconds(self, sized: Sequence[tuple[Combination, int]], held: Ranges) -> Ranges:
        """Forward seconds that are computed again at speed 1; infinite where memory does not suffice."""
        room_NR = self._by_size(self._room, sized)
        ranges = self._ranges
        if ranges.recompute is None:
            # so many bytes must be saved per micro-batch
            needed_NR = np.maximum(ranges.kept_R - (room_NR - ranges.largest_R) // held, 1)
            return ranges.staircases.least_seconds(np.where(held * ranges.kept_R <= room_NR, 0, needed_NR))
        bytes_NR = held * ranges.settled_kept_R + ranges.settled_working_R
        return np.where(bytes_NR <= room_NR, ranges.settled_R, NEVER)

    def _room(self, combination: Combination, sizes_N1: NDArray[np.int64]) -> Ranges:
        """Bytes that parameters, sums and states leave to activations."""
        assert self._limit is not None
        return self._limit - self._resident(combination, sizes_N1)

    def _resident(self, combination: Combination, sizes_N1: NDArray[np.int64]) -> Ranges:
        """Bytes of parameters, sums and states."""
        parameters_R = combination.strategy.chunks * self._ranges.parameters_R
        widest_R = self._ranges.widest_R(streamed_layers(combination.strategy))
        resident_NR: Ranges = self._problem.resident(combination, sizes_N1, parameters_R, widest_R)
        return resident_NR


def _alike(combination: Combination) -> tuple[object, ...]:
    """What makes a difference to a group beside its size and what is in flight, in one form."""
    strategy = combination.strategy
    splits = FORMULAS[strategy.schedule].splits
    return splits, strategy.chunks, strategy.sharding, strategy.offload
