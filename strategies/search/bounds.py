"""What no cut of a combination takes less than, memory considered, before any range of layers is looked at.

Of all ranges of as many layers the least of each quantity counts, as if one range had all of them. What is
cut is then only how many layers each stage has, in whatever order: all stages that take no more than some
seconds must have all layers between them, and what is computed again has a Lagrangian bound. Models are alike
within and differ at their ends: the first and the last stage have ranges of their own, and layers that take
much less than the others (an embedding) are not counted, since a range with one of them would stand for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np

from strategies.search.cost import Problem, streamed_layers
from strategies.search.families import ANY, FIRST, INNER, LAST, Groups, Part, Values, apart, places_of
from strategies.search.formulas import FORMULAS
from strategies.search.shortest import NEVER
from strategies.search.space import Combination
from strategies.search.windows import Window, Windows

MUCH = 1 << 48
"""Bytes or seconds of a range that there is not: nothing overflows, and it does not fit."""

FINEST = 1024
"""Of how many parts of what all layers save it is said how long they take to be computed again."""

COUNTED = 0.75
"""Of the mean layer's seconds: a layer that takes less does not count."""

NARROW = 32
"""Layers: where no stage has more, it does not pay to look at fewer yet."""

PRICES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Of a layer, in its mean forward seconds: the Lagrangian's multipliers that are tried."""


def bounds_of(problem: Problem, limit: int | None, recompute: tuple[int, ...] | None) -> Bounds:
    """What does not go by ``limit`` is worked out once for a problem."""
    key = Bounds, recompute
    if key not in problem.known:
        problem.known[key] = Bounds(problem, limit, recompute)
    bounds: Bounds = copy(problem.known[key])
    bounds.limit = limit
    return bounds


class Bounds:
    """Of one problem, in one form. ``limit`` and ``recompute`` are as in ``StageTables``."""

    def __init__(self, problem: Problem, limit: int | None, recompute: tuple[int, ...] | None) -> None:
        self._problem, self.limit, self._recompute = problem, limit, recompute
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
        usable = [known.any(axis=0) for _, _, known in self._spans]
        self._usable_PL = np.asarray([*usable, *_either(usable, np.logical_or)])
        lengths = zip((longest_FL, longest_FL[:1], whole_FL, longest_FL), self._spans, strict=True)
        longest = [
            np.where(known, stops - firsts[:, None], 1).max(axis=0) for stops, (firsts, _, known) in lengths
        ]
        self._longest_PL = np.asarray([*longest, *_either(longest, np.maximum)])
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
        self.windows = Windows(problem, self._counted_before, self._least_seconds)

    def least(self, parts: Sequence[Part], enough: float = NEVER) -> list[float]:
        """Seconds of each of ``parts``; infinite where nothing fits, or takes less than ``enough``."""
        least = dict.fromkeys(parts, NEVER)
        windows = {each: self.windows.of(each, enough) for each, _ in parts}
        alike: dict[tuple[bool, int], list[Part]] = {}
        for part in parts:
            window = windows[part[0]]
            if window is not None:
                splits = FORMULAS[part[0].strategy.schedule].splits
                halvings = 0  # those that need many layers are not looked at with those that need few
                while len(self._layers_L) >> halvings + 1 >= max(NARROW, *window[1]):
                    halvings += 1
                alike.setdefault((splits, halvings), []).append(part)
        for some in alike.values():
            ordered, groups = self._groups(some, windows)
            least.update(zip(ordered, self._seconds(groups).tolist(), strict=True))
        return [least[part] for part in parts]

    def memory_bytes(self, combinations: Sequence[Combination]) -> list[float]:
        """The fullest worker of each of ``combinations`` has no less, whatever is cut and computed again."""
        parts: list[Part] = [(each, None) for each in combinations]
        ordered, groups = self._groups(parts, {each: self.windows.of(each, NEVER) for each in combinations})
        kept_NL = groups.held_NL * groups.places(self._kept_PL)
        if self._recompute is None:
            largest_NL = groups.places(self._largest_PL)
            kept_NL = np.minimum(kept_NL, groups.held_NL * groups.places(self._leanest_PL) + largest_NL)
        bytes_NL = (self._resident(groups) + kept_NL).astype(np.float64)
        bytes_NL[~groups.usable_NL] = NEVER
        least = dict(zip(ordered, self._least_maximum(bytes_NL, groups).tolist(), strict=True))
        return [least[part] for part in parts]

    def _seconds(self, groups: Groups) -> Values:
        """[F], of combinations all of which split backwards or none."""
        extra_NL = self._extra(groups)
        # what has no room for all layers is not looked at any further
        most_N = np.where(extra_NL < NEVER, groups.layers_L, 0).max(axis=1)
        room_F = groups.of(most_N, 0).sum(axis=1) * groups.chunks_F >= len(self._layers_L)
        least_F = np.full(len(room_F), NEVER)
        if room_F.any():
            few, used_N = groups.of_parts(room_F)
            least_F[room_F] = self._seconds_of(few, extra_NL[used_N])
        return least_F

    def _seconds_of(self, groups: Groups, extra_NL: Values) -> Values:
        """As ``_seconds``, of groups that compute again for so long at speed 1."""
        problem, pace = self._problem, self._problem.speed
        one = groups.ways[0][0]
        splits = FORMULAS[one.strategy.schedule].splits
        rounds_N = problem.rounds(one, groups.sizes_N)
        sent = [problem.sent_bytes(each, groups.sizes_N[some], 1) for each, some in groups.ways]
        rate_N = np.concatenate(sent) / problem.costs.link_bytes_per_second
        extra_NL = extra_NL / pace
        extra_F = self._total(extra_NL, groups)
        fits_NL, fits_F = extra_NL < NEVER, extra_F < NEVER
        extra_NL, extra_F = np.where(fits_NL, extra_NL, 0.0), np.where(fits_F, extra_F, 0.0)

        both, weighing, both_PL, weighing_PL = self._seconds_by_layers(splits=splits)
        total_F = both + weighing + extra_F
        if splits:
            fill_F = np.maximum(both - weighing + extra_F, 0.0)
            fills_F = problem.split_fill(one) + extra_F
        else:
            fill_F = fills_F = total_F / groups.chunks_F

        # the slowest stage takes no less than their mean weighed by 1 / rounds
        fewest_F = groups.of(rounds_N, np.iinfo(np.int64).max).min(axis=1)
        sent_F = groups.of(rate_N / rounds_N, NEVER).min(axis=1) * problem.parameters[-1]
        beyond_F = np.maximum(total_F - fills_F / fewest_F, 0.0) + sent_F
        slowest_F = beyond_F / groups.of(1.0 / rounds_N, 0.0).sum(axis=1)

        # and no less than it would if they were cut for that alone
        both_NL, weighing_NL = groups.places(both_PL), groups.places(weighing_PL)
        rounds_N1, chunks_N1 = rounds_N[:, None], groups.chunks_N[:, None]
        if splits:
            gradient_NL = both_NL + extra_NL
            fill_at_most_NL = (rounds_N1 - 1) * gradient_NL + (rounds_N1 + 1) * weighing_NL
            least_NL = chunks_N1 * np.minimum(rounds_N1 * (gradient_NL + weighing_NL), fill_at_most_NL)
        else:
            least_NL = (chunks_N1 * rounds_N1 - 1) * (both_NL + weighing_NL + extra_NL)
        least_NL += rate_N[:, None] * (chunks_N1 * groups.places(self._parameters_PL))
        least_NL[~fits_NL] = NEVER
        slowest_F = np.maximum(slowest_F, self._least_maximum(least_NL, groups))
        crossing_F = (groups.chunks_F * groups.counts_F - 1) * problem.least_crossing
        least_F: Values = np.where(fits_F, fill_F + slowest_F + crossing_F, NEVER)
        return least_F

    def _least_seconds(self, splits: bool) -> tuple[float, Values]:
        """As ``Windows`` asks for."""
        both, weighing, both_PL, weighing_PL = self._seconds_by_layers(splits=splits)
        return both + weighing, both_PL[ANY] + weighing_PL[ANY]

    def _seconds_by_layers(self, *, splits: bool) -> tuple[float, float, Values, Values]:
        """(forward and input gradient, weight gradient) of all layers and at least of so many, [P, L]."""
        if splits not in self._times:
            problem = self._problem
            inputs, weights = (np.asarray(each) for each in (problem.split if splits else problem.whole))
            both, weighing = (np.asarray(problem.forward) + inputs) / problem.speed, weights / problem.speed
            self._times[splits] = both[-1], weighing[-1], self._least(both), self._least(weighing)
        return self._times[splits]

    def _least_maximum(self, values_NL: Values, groups: Groups) -> Values:
        """[F]: of stages that take so much by their number of layers the one that takes most takes no less:
        if none takes more they must have all layers between them."""
        values_NL = np.minimum.accumulate(values_NL[:, ::-1], axis=1)[:, ::-1]
        # where some layers do not count a stage may have none that does
        fewest_N = values_NL[:, 0] if self._all_count else np.zeros(len(values_NL))
        most_F: Values = groups.of(fewest_N, -NEVER).max(axis=1)
        padded_NL = np.concatenate([values_NL, np.full_like(values_NL[:1], NEVER)])
        for chunks in dict.fromkeys(groups.chunks_F.tolist()):
            some_F = groups.chunks_F == chunks
            all_FX = padded_NL[groups.places_FK[some_F]].reshape(int(some_F.sum()), -1)
            enough = -(-len(self._layers_L) // chunks) - 1
            least_F = np.partition(all_FX, enough, axis=1)[:, enough]
            most_F[some_F] = np.maximum(most_F[some_F], least_F)
        return most_F

    def _groups(
        self, parts: Sequence[Part], windows: Mapping[Combination, Window | None]
    ) -> tuple[list[Part], Groups]:
        """(``parts`` in another order, their groups). Each has a window."""
        families, of_ways = apart(parts)
        numbers: dict[object, int] = {}
        kinds: list[tuple[int, ...]] = []
        held, rows = [], []
        nothing, before = ((0, 0),) * max(len(each.sizes) for each, _ in families), self._counted_before
        for each, lengths in families:
            window, chunks = windows[each], each.strategy.chunks
            assert window is not None, "what takes too long in any case is not looked at"
            fewest, most = window
            shortest = 1 if each.stages > 1 else self._problem.layers
            if lengths is not None:
                shortest = lengths[0]
                if chunks == 1:
                    least, greatest = before[[*lengths]].tolist()
                    fewest = [max(fewest[0], least), *fewest[1:]]
                    most = [min(most[0], greatest), *most[1:]]
            elif chunks == 1 and fewest[0] > 1:
                shortest = max(shortest, int(before.searchsorted(fewest[0])))
            in_flight = nothing if self.limit is None else self._problem.held_by_layers(each, shortest)
            row = []
            for size, place, low, high, (of_group, key) in zip(
                each.sizes, places_of(each), fewest, most, in_flight, strict=False
            ):
                kind = size, chunks, place, low, high, key
                number = numbers.setdefault(kind, len(numbers))
                if number == len(kinds):
                    kinds.append((size, chunks, place, low, high))
                    held.append(of_group)
                row.append(number)
            rows.append(row)
        sizes_N, chunks_N, place_N, least_N, most_N = np.asarray(kinds).T
        width = int(most_N.max())
        layers_L = self._layers_L[:width]
        usable_NL = self._usable_PL[place_N, :width]
        usable_NL &= (least_N[:, None] <= layers_L) & (layers_L <= most_N[:, None])
        held_NL = np.zeros((len(kinds), width), dtype=np.int64)
        if self.limit is not None:
            of_all_NL = np.empty((len(kinds), self._problem.layers), dtype=np.int64)
            for n, of_kind in enumerate(held):
                of_all_NL[n] = of_kind
            held_NL = of_all_NL[np.arange(len(kinds))[:, None], self._longest_PL[place_N, :width] - 1]
        counts = [len(row) for row in rows]
        most_groups = max(counts)
        groups = Groups(
            layers_L,
            sizes_N,
            chunks_N,
            held_NL,
            usable_NL,
            place_N,
            np.asarray([each.strategy.chunks for each, _ in families]),
            np.asarray(counts),
            np.asarray([row + [len(kinds)] * (most_groups - len(row)) for row in rows]),
        )
        ordered = [part for _, _, some in of_ways for part in some]
        return ordered, groups.by_way([(way, families_F) for way, families_F, _ in of_ways])

    def _extra(self, groups: Groups) -> Values:
        """Least forward seconds, at speed 1, that are computed again, [N, L]; infinite where nothing fits."""
        if self.limit is None:
            settled_NL = groups.places(self._settled_PL) * self._problem.speed
            return np.where(groups.usable_NL, settled_NL, NEVER)
        held_NL, kept_NL = groups.held_NL, groups.places(self._kept_PL)
        room_NL = self.limit - self._resident(groups)
        fits_NL = held_NL * kept_NL <= room_NL
        if self._recompute is not None:
            settled_NL = groups.places(self._settled_PL) * self._problem.speed
            return np.where(fits_NL & groups.usable_NL, settled_NL, NEVER)
        unit, seconds_PU = self._savings
        room_NL -= groups.places(self._largest_PL)
        needed_NL = kept_NL - room_NL // held_NL - 1
        needed_NL //= unit
        np.clip(needed_NL, 0, seconds_PU.shape[1] - 1, out=needed_NL)
        needed_NL += groups.place_N[:, None] * seconds_PU.shape[1]
        extra_NL: Values = seconds_PU.take(needed_NL)
        extra_NL[fits_NL] = 0.0
        fits_NL |= held_NL * groups.places(self._leanest_PL) <= room_NL
        fits_NL &= groups.usable_NL
        extra_NL[~fits_NL] = NEVER
        return extra_NL

    def _resident(self, groups: Groups) -> Values:
        """Bytes beside activations, [N, L]."""
        problem = self._problem
        parameters_NL = groups.chunks_N[:, None] * groups.places(self._parameters_PL)
        resident_NL = np.empty_like(parameters_NL)
        for each, some in groups.ways:
            # what does not count may be between two layers that do
            streamed = streamed_layers(each.strategy) if self._all_count else 1
            consecutive_L = np.minimum(groups.layers_L, streamed)
            widest_L = self._parameters_PL[ANY, consecutive_L - 1]
            sizes_N1 = groups.sizes_N[some, None]
            resident_NL[some] = problem.resident(each, sizes_N1, parameters_NL[some], widest_L)
        return resident_NL

    @cached_property
    def _savings(self) -> tuple[int, Values]:
        """(bytes, the least seconds in which one byte more than none, one time, two times, ... as many are
        saved, [place, times]: of so many layers, and with parts of layers)."""
        saved, again = np.asarray(self._problem.saved), np.asarray(self._problem.again)
        unit = max(int(saved.sum()) // FINEST, 1)
        bytes_U = np.arange(saved.sum() // unit + 1) * unit + 1
        seconds = []
        early, late = slice(-1), slice(1, None)
        for there in (slice(None), early, late, slice(1, -1), early, late):  # no range has other layers
            saved_X, again_X = saved[there][saved[there] > 0], again[there][saved[there] > 0]
            order = np.argsort(again_X / saved_X, kind="stable")
            seconds_of, saved_of = (
                np.concatenate(([0.0], each[order].cumsum())) for each in (again_X, saved_X)
            )
            by_count = np.concatenate(([0.0], np.sort(again_X).cumsum()))
            counts_U = np.minimum(-(-bytes_U // saved_X.max(initial=1)), len(by_count) - 1)
            seconds.append(np.maximum(np.interp(bytes_U, saved_of, seconds_of), by_count[counts_U]))
        return unit, np.asarray(seconds)

    def _total(self, extra_NL: Values, groups: Groups) -> Values:
        """Least seconds that all stages together compute again, [F]."""
        if self.limit is None or self._recompute is not None or not extra_NL[extra_NL < NEVER].any():
            return np.full(len(groups.places_FK), self._settled)
        prices_X = np.asarray(PRICES) * (float(np.mean(self._problem.again)) / self._problem.speed)
        priced_XL = prices_X[:, None] * groups.layers_L
        beside_XN = (extra_NL - priced_XL[:, None]).min(axis=2)
        if not self._all_count:
            beside_XN = np.minimum(beside_XN, 0.0)
        beside_XF = groups.chunks_F * groups.of(beside_XN, 0.0).sum(axis=2)
        total_XF = beside_XF + prices_X[:, None] * len(self._layers_L)
        total_F: Values = total_XF.max(axis=0, initial=0.0)
        return total_F

    def _least(self, before: Any, first: Any = 0) -> Values:
        """The least sum of a range of so many layers and of what comes with its first, [P, L], from sums over
        all layers before each, which do not fall; much where there is none."""
        before = np.asarray(before)
        of_first = first - before[:-1]
        least = [
            np.where(known, before[stops] + of_first[firsts, None], MUCH).min(axis=0)
            for firsts, stops, known in self._spans
        ]
        return np.asarray([*least, *_either(least, np.minimum)])

    def _largest(self, values: Sequence[int]) -> Values:
        """The least maximum of a range of so many layers, [P, L]."""
        least = np.sort(np.asarray(values)[self._counted])
        first = np.maximum.accumulate(values)[self._spans[FIRST][1][0] - 1]
        last = np.maximum.accumulate(values[::-1])[::-1][self._counted[::-1]]
        return np.asarray([least, first, last, least, least, least])


def _either(values: Sequence[Values], of: np.ufunc) -> tuple[Values, Values]:
    """Of (EARLY, LATE) ranges, from those of the places before: one is FIRST or INNER, LAST or INNER."""
    return of(values[FIRST], values[INNER]), of(values[LAST], values[INNER])
