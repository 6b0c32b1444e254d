"""What no cut of a combination takes less than, memory considered, before any range of layers is looked at.

Of all ranges of as many layers the least of each quantity counts, as if one range had all of them. What is
cut is then only how many layers each stage has, in whatever order: all stages that take no more than some
seconds must have all layers between them, and what is computed again has a Lagrangian bound. Models are alike
within and differ at their ends: the first and the last stage have ranges of their own, and layers that take
much less than the others (an embedding) are not counted, since a range with one of them would stand for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.search.cost import Problem, streamed_layers
from strategies.search.formulas import FORMULAS
from strategies.search.shortest import NEVER
from strategies.search.space import Combination

Values = NDArray[Any]
"""[axis of each letter]: S, ways to shard and offload; F, families of combinations that differ in S alone;
K, a family's groups; N, groups that are alike whatever S; L, one entry for each number of layers that count,
from 1; P, places of a range."""

Part = tuple[Combination, tuple[int, int] | None]
"""All cuts of a combination, or those whose first stage has so many layers (from, to): its workers keep what
they do if it has the fewest."""

ANY, FIRST, LAST, INNER = range(4)
"""Places of a range: wherever it is, from the first layer on, to the last one, between."""

MUCH = 1 << 48
"""Bytes or seconds of a range that there is not: nothing overflows, and it does not fit."""

FINEST = 1024
"""Of how many parts of what all layers save it is said how long they take to be computed again."""

COUNTED = 0.75
"""Of the mean layer's seconds: a layer that takes less does not count."""

PRICES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Of a layer, in its mean forward seconds: the Lagrangian's multipliers that are tried."""


@dataclass(frozen=True, slots=True)
class Groups:
    """All groups of some families. ``places_FK``: which of the N they are, N where a family has fewer;
    ``usable_NL``: how many layers they may have; ``place_N``: which ranges, P."""

    sizes_N: Values
    chunks_N: Values
    held_NL: Values
    usable_NL: Values
    place_N: Values
    chunks_F: Values
    counts_F: Values
    places_FK: Values

    def of(self, values_N: Values, otherwise: float) -> Values:
        """[..., F, K] of [..., N]."""
        padding = np.full((*values_N.shape[:-1], 1), otherwise, dtype=values_N.dtype)
        return np.concatenate([values_N, padding], axis=-1)[..., self.places_FK]

    def of_families(self, some_F: Values) -> tuple[Groups, Values]:
        """(those of some families alone, which of the N they are)."""
        if some_F.all():
            return self, np.arange(len(self.sizes_N))
        places_FK = self.places_FK[some_F]
        used_N = np.bincount(places_FK.ravel(), minlength=len(self.sizes_N) + 1)[:-1] > 0
        place_N = np.concatenate((used_N.cumsum() - 1, [used_N.sum()]))
        few = Groups(
            self.sizes_N[used_N],
            self.chunks_N[used_N],
            self.held_NL[used_N],
            self.usable_NL[used_N],
            self.place_N[used_N],
            self.chunks_F[some_F],
            self.counts_F[some_F],
            place_N[places_FK],
        )
        return few, used_N


class Bounds:
    """Of one problem, in one form. ``limit`` and ``recompute`` are as in ``StageTables``."""

    def __init__(self, problem: Problem, limit: int | None, recompute: tuple[int, ...] | None) -> None:
        self._problem, self._limit, self._recompute = problem, limit, recompute
        layers = problem.layers
        seconds = np.diff(problem.forward) + np.diff(problem.whole[0]) + np.diff(problem.whole[1])
        counts = seconds >= COUNTED * seconds.mean()
        self._counted = counted = np.flatnonzero(counts)
        self._all_count = len(counted) == layers
        self._layers_L = np.arange(1, len(counted) + 1)
        """So many that count."""
        self._counted_before = np.concatenate(([0], counts.cumsum()))
        following_FL = self._counted_before[:-1, None] + self._layers_L  # the next that counts
        ends = np.concatenate((counted, np.full(layers, layers)))
        known_FL = following_FL <= len(counted)
        shortest_FL, longest_FL = ends[following_FL - 1] + known_FL, ends[following_FL]
        starts_F, whole_FL = np.arange(layers), np.full_like(shortest_FL, layers)
        to_the_end_FL = len(counted) - self._counted_before[:-1, None] == self._layers_L
        inner_FL = known_FL & (shortest_FL < layers)
        inner_FL[0] = False
        self._spans = [  # of each place: first layers, where ranges with so many that count end, and whether
            (starts_F, shortest_FL, known_FL),
            (starts_F[:1], shortest_FL[:1], known_FL[:1]),
            (starts_F, whole_FL, to_the_end_FL),
            (starts_F, shortest_FL, inner_FL),
        ]
        self._usable_PL = np.asarray([known.any(axis=0) for _, _, known in self._spans])
        lengths = zip((longest_FL, longest_FL[:1], whole_FL, longest_FL), self._spans, strict=True)
        longest = [
            np.where(known, stops - firsts[:, None], 1).max(axis=0) for stops, (firsts, _, known) in lengths
        ]
        self._longest_PL = np.asarray(longest)
        again = np.zeros(layers, dtype=bool)
        again[list(recompute or ())] = True
        settled = np.where(again, problem.again, 0.0) / problem.speed
        self._settled = float(settled.sum())
        kept = np.diff(problem.kept) - np.where(again, problem.saved, 0)
        inputs = np.asarray([problem.input_bytes(first) for first in range(layers)])
        self._parameters_PL = self._least(problem.parameters)
        self._kept_PL = self._least([0, *kept.cumsum()], inputs)
        self._leanest_PL = self._least([0, *(kept - problem.saved).cumsum()], inputs)
        self._largest_PL = self._largest(problem.saved)
        self._settled_PL = self._least([0.0, *settled.cumsum()])
        self._times: dict[bool, tuple[float, float, Values, Values]] = {}

    def least(self, parts: Sequence[Part]) -> list[float]:
        """Seconds of each of ``parts``; infinite where nothing fits."""
        least: dict[Part, float] = {}
        for splits in (False, True):
            some = [each for each in parts if FORMULAS[each[0].strategy.schedule].splits == splits]
            if some:
                families, ways, places = _apart(some)
                least_SF = self._seconds(ways, self._groups(families)).tolist()
                least.update((each, least_SF[s][f]) for each, (s, f) in zip(some, places, strict=True))
        return [least[each] for each in parts]

    def memory_bytes(self, combinations: Sequence[Combination]) -> list[float]:
        """The fullest worker of each of ``combinations`` has no less, whatever is cut and computed again."""
        families, ways, places = _apart([(each, None) for each in combinations])
        groups = self._groups(families)
        kept_NL = groups.held_NL * self._kept_PL[groups.place_N]
        if self._recompute is None:
            largest_NL = self._largest_PL[groups.place_N]
            kept_NL = np.minimum(kept_NL, groups.held_NL * self._leanest_PL[groups.place_N] + largest_NL)
        bytes_SNL = self._resident(ways, groups) + kept_NL
        bytes_SNL = np.where(groups.usable_NL, bytes_SNL.astype(np.float64), NEVER)
        least_SF = self._least_maximum(bytes_SNL, groups).tolist()
        return [least_SF[s][f] for s, f in places]

    def _seconds(self, ways: Sequence[Combination], groups: Groups) -> Values:
        """[S, F]. ``ways``: one combination for each S, all of which split backwards or none."""
        extra_SNL = self._extra(ways, groups)
        # what has no room for all layers is not looked at any further
        most_SN = np.where(extra_SNL < NEVER, self._layers_L, 0).max(axis=2)
        room_F = (groups.of(most_SN, 0).sum(axis=2) * groups.chunks_F >= len(self._layers_L)).any(axis=0)
        least_SF = np.full((len(ways), len(room_F)), NEVER)
        if room_F.any():
            few, used_N = groups.of_families(room_F)
            least_SF[:, room_F] = self._seconds_of(ways, few, extra_SNL[:, used_N])
        return least_SF

    def _seconds_of(self, ways: Sequence[Combination], groups: Groups, extra_SNL: Values) -> Values:
        """As ``_seconds``, of groups that compute again for so long at speed 1."""
        problem, pace = self._problem, self._problem.speed
        splits = FORMULAS[ways[0].strategy.schedule].splits
        rounds_N = problem.rounds(ways[0], groups.sizes_N)
        rate_SN = np.asarray([problem.sent_bytes(each, groups.sizes_N, 1) for each in ways])
        rate_SN = rate_SN / problem.costs.link_bytes_per_second
        extra_SNL = extra_SNL / pace
        extra_SF = self._total(extra_SNL, groups)
        fits_SNL, fits_SF = extra_SNL < NEVER, extra_SF < NEVER
        extra_SNL, extra_SF = np.where(fits_SNL, extra_SNL, 0.0), np.where(fits_SF, extra_SF, 0.0)

        both, weighing, both_PL, weighing_PL = self._seconds_by_layers(splits=splits)
        total_SF = both + weighing + extra_SF
        if splits:
            fill_SF = np.maximum(both - weighing + extra_SF, 0.0)
            fills_SF = problem.split_fill(ways[0]) + extra_SF
        else:
            fill_SF = fills_SF = total_SF / groups.chunks_F

        # the slowest stage takes no less than their mean weighed by 1 / rounds
        fewest_F = groups.of(rounds_N, np.iinfo(np.int64).max).min(axis=1)
        sent_SF = groups.of(rate_SN / rounds_N, NEVER).min(axis=2) * problem.parameters[-1]
        beyond_SF = np.maximum(total_SF - fills_SF / fewest_F, 0.0) + sent_SF
        slowest_SF = beyond_SF / groups.of(1.0 / rounds_N, 0.0).sum(axis=1)

        # and no less than it would if they were cut for that alone
        both_NL, weighing_NL = both_PL[groups.place_N], weighing_PL[groups.place_N]
        rounds_N1, chunks_N1 = rounds_N[:, None], groups.chunks_N[:, None]
        if splits:
            gradient_SNL = both_NL + extra_SNL
            fill_at_most_SNL = (rounds_N1 - 1) * gradient_SNL + (rounds_N1 + 1) * weighing_NL
            least_SNL = chunks_N1 * np.minimum(rounds_N1 * (gradient_SNL + weighing_NL), fill_at_most_SNL)
        else:
            least_SNL = (chunks_N1 * rounds_N1 - 1) * (both_NL + weighing_NL + extra_SNL)
        least_SNL += rate_SN[:, :, None] * (chunks_N1 * self._parameters_PL[groups.place_N])
        least_SNL[~fits_SNL] = NEVER
        slowest_SF = np.maximum(slowest_SF, self._least_maximum(least_SNL, groups))
        crossing_F = (groups.chunks_F * groups.counts_F - 1) * problem.least_crossing
        least_SF: Values = np.where(fits_SF, fill_SF + slowest_SF + crossing_F, NEVER)
        return least_SF

    def _seconds_by_layers(self, *, splits: bool) -> tuple[float, float, Values, Values]:
        """(forward and input gradient, weight gradient) of all layers and at least of so many, [P, L]."""
        if splits not in self._times:
            problem = self._problem
            inputs, weights = (np.asarray(each) for each in (problem.split if splits else problem.whole))
            both, weighing = (np.asarray(problem.forward) + inputs) / problem.speed, weights / problem.speed
            self._times[splits] = both[-1], weighing[-1], self._least(both), self._least(weighing)
        return self._times[splits]

    def _least_maximum(self, values_SNL: Values, groups: Groups) -> Values:
        """[S, F]: of stages that take so much by their number of layers the one that takes most takes no
        less: if none takes more they must have all layers between them."""
        values_SNL = np.minimum.accumulate(values_SNL[:, :, ::-1], axis=2)[:, :, ::-1]
        # where some layers do not count a stage may have none that does
        fewest_SN = values_SNL[:, :, 0] if self._all_count else np.zeros(values_SNL.shape[:2])
        most_SF: Values = groups.of(fewest_SN, -NEVER).max(axis=2)
        padded_SNL = np.concatenate([values_SNL, np.full_like(values_SNL[:, :1], NEVER)], axis=1)
        for chunks in dict.fromkeys(groups.chunks_F.tolist()):
            some_F = groups.chunks_F == chunks
            all_SFX = padded_SNL[:, groups.places_FK[some_F]].reshape(len(values_SNL), int(some_F.sum()), -1)
            enough = -(-len(self._layers_L) // chunks) - 1
            least_SF = np.partition(all_SFX, enough, axis=2)[:, :, enough]
            most_SF[:, some_F] = np.maximum(most_SF[:, some_F], least_SF)
        return most_SF

    def _groups(self, families: Sequence[Part]) -> Groups:
        kinds: dict[object, int] = {}
        sizes, chunks, held, firsts, places, rows = [], [], [], [], [], []
        plenty = self._limit is None
        for combination, lengths in families:
            row = []
            of_chunks = combination.strategy.chunks
            shortest = 1 if combination.stages > 1 else self._problem.layers
            if lengths is not None:
                shortest = lengths[0]
            for k, size in enumerate(combination.sizes):
                of_group, key = (0, 0) if plenty else self._problem.held_by_layers(combination, k, shortest)
                only = lengths if k == 0 and of_chunks == 1 else None
                place = _place(combination, k)
                kind = size, of_chunks, key, only, place
                if kind not in kinds:
                    kinds[kind] = len(kinds)
                    sizes.append(size)
                    chunks.append(of_chunks)
                    held.append(of_group)
                    firsts.append(only)
                    places.append(place)
                row.append(kinds[kind])
            rows.append(row)
        held_NL = np.empty((len(kinds), len(self._layers_L)), dtype=np.int64)
        place_N = np.asarray(places)
        usable_NL = self._usable_PL[place_N]
        for n, (of_kind, only) in enumerate(zip(held, firsts, strict=True)):
            held_NL[n] = of_kind if isinstance(of_kind, int) else of_kind[self._longest_PL[places[n]] - 1]
            if only is not None:
                least, most = self._counted_before[[*only]]
                usable_NL[n] &= (least <= self._layers_L) & (self._layers_L <= most)
        counts = [len(row) for row in rows]
        return Groups(
            np.asarray(sizes),
            np.asarray(chunks),
            held_NL,
            usable_NL,
            place_N,
            np.asarray([each.strategy.chunks for each, _ in families]),
            np.asarray(counts),
            np.asarray([row + [len(kinds)] * (max(counts) - len(row)) for row in rows]),
        )

    def _extra(self, ways: Sequence[Combination], groups: Groups) -> Values:
        """Least forward seconds, at speed 1, that are computed again, [S, N, L]; infinite where nothing
        fits."""
        if self._limit is None:
            shape = len(ways), *groups.held_NL.shape
            extra_NL = self._settled_PL[groups.place_N] * self._problem.speed
            return np.broadcast_to(np.where(groups.usable_NL, extra_NL, NEVER), shape)
        held_NL = groups.held_NL
        room_SNL = self._limit - self._resident(ways, groups)
        fits_SNL = held_NL * self._kept_PL[groups.place_N] <= room_SNL
        if self._recompute is not None:
            extra_NL = self._settled_PL[groups.place_N] * self._problem.speed
            return np.where(fits_SNL & groups.usable_NL, extra_NL, NEVER)
        unit, seconds_PU = self._savings
        room_SNL -= self._largest_PL[groups.place_N]
        needed_SNL = self._kept_PL[groups.place_N] - room_SNL // held_NL - 1
        needed_SNL //= unit
        np.clip(needed_SNL, 0, seconds_PU.shape[1] - 1, out=needed_SNL)
        needed_SNL += groups.place_N[:, None] * seconds_PU.shape[1]
        extra_SNL: Values = seconds_PU.take(needed_SNL)
        extra_SNL[fits_SNL] = 0.0
        fits_SNL |= held_NL * self._leanest_PL[groups.place_N] <= room_SNL
        fits_SNL &= groups.usable_NL
        extra_SNL[~fits_SNL] = NEVER
        return extra_SNL

    def _resident(self, ways: Sequence[Combination], groups: Groups) -> Values:
        """Bytes beside activations, [S, N, L]."""
        problem, resident = self._problem, []
        parameters_NL = groups.chunks_N[:, None] * self._parameters_PL[groups.place_N]
        for each in ways:
            # what does not count may be between two layers that do
            streamed = streamed_layers(each.strategy) if self._all_count else 1
            consecutive_L = np.minimum(self._layers_L, streamed)
            widest_L = self._parameters_PL[ANY, consecutive_L - 1]
            of_way = problem.resident(each, groups.sizes_N[:, None], parameters_NL, widest_L)
            resident.append(np.broadcast_to(of_way, parameters_NL.shape))
        return np.asarray(resident)

    @cached_property
    def _savings(self) -> tuple[int, Values]:
        """(bytes, the least seconds in which one byte more than none, one time, two times, ... as many are
        saved, [place, times]: of so many layers, and with parts of layers)."""
        saved, again = np.asarray(self._problem.saved), np.asarray(self._problem.again)
        unit = max(int(saved.sum()) // FINEST, 1)
        bytes_U = np.arange(saved.sum() // unit + 1) * unit + 1
        seconds = []
        for there in (slice(None), slice(-1), slice(1, None), slice(1, -1)):  # no range has other layers
            saved_X, again_X = saved[there][saved[there] > 0], again[there][saved[there] > 0]
            order = np.argsort(again_X / saved_X, kind="stable")
            seconds_of, saved_of = (
                np.concatenate(([0.0], each[order].cumsum())) for each in (again_X, saved_X)
            )
            by_count = np.concatenate(([0.0], np.sort(again_X).cumsum()))
            counts_U = np.minimum(-(-bytes_U // saved_X.max(initial=1)), len(by_count) - 1)
            seconds.append(np.maximum(np.interp(bytes_U, saved_of, seconds_of), by_count[counts_U]))
        return unit, np.asarray(seconds)

    def _total(self, extra_SNL: Values, groups: Groups) -> Values:
        """Least seconds that all stages together compute again, [S, F]."""
        shape = len(extra_SNL), len(groups.places_FK)
        if self._limit is None or self._recompute is not None or not extra_SNL[extra_SNL < NEVER].any():
            return np.full(shape, self._settled)
        mean = float(np.mean(self._problem.again)) / self._problem.speed
        total_SF = np.zeros(shape)
        for price in PRICES:
            beside_SN = (extra_SNL - price * mean * self._layers_L).min(axis=2)
            if not self._all_count:
                beside_SN = np.minimum(beside_SN, 0.0)
            beside_SF = groups.chunks_F * groups.of(beside_SN, 0.0).sum(axis=2)
            np.maximum(total_SF, beside_SF + price * mean * len(self._layers_L), out=total_SF)
        return total_SF

    def _least(self, before: Any, first: Any = 0) -> Values:
        """The least sum of a range of so many layers and of what comes with its first, [P, L], from sums over
        all layers before each, which do not fall; much where there is none."""
        before = np.asarray(before)
        of_first = first - before[:-1]
        least = [
            np.where(known, before[stops] + of_first[firsts, None], MUCH).min(axis=0)
            for firsts, stops, known in self._spans
        ]
        return np.asarray(least)

    def _largest(self, values: Sequence[int]) -> Values:
        """The least maximum of a range of so many layers, [P, L]."""
        least = np.sort(np.asarray(values)[self._counted])
        first = np.maximum.accumulate(values)[self._spans[FIRST][1][0] - 1]
        last = np.maximum.accumulate(values[::-1])[::-1][self._counted[::-1]]
        return np.asarray([least, first, last, least])


def _place(combination: Combination, group: int) -> int:
    if combination.strategy.chunks > 1 or len(combination.sizes) == 1:
        return ANY
    return FIRST if group == 0 else LAST if group == len(combination.sizes) - 1 else INNER


def _apart(parts: Sequence[Part]) -> tuple[list[Part], list[Combination], list[tuple[int, int]]]:
    """(one of each family, one of each way to shard and offload, the places of each part in those: way and
    family)."""
    families: dict[object, tuple[int, Part]] = {}
    ways: dict[object, tuple[int, Combination]] = {}
    places = []
    for part in parts:
        each, lengths = part
        strategy = each.strategy
        s, _ = ways.setdefault((strategy.sharding, strategy.offload), (len(ways), each))
        family = strategy.schedule, strategy.chunks, each.sizes, lengths
        f, _ = families.setdefault(family, (len(families), part))
        places.append((s, f))
    return [part for _, part in families.values()], [each for _, each in ways.values()], places
