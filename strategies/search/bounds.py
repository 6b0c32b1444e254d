"""What no cut of a combination takes less than, memory considered, before any range of layers is looked at.

Of all ranges of as many layers the least of each quantity counts, as if one range had all of them. What is
cut is then only how many layers each stage has, in whatever order: all stages that take no more than some
seconds must have all layers between them, and what is computed again has a Lagrangian bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from strategies.search.cost import Problem, streamed_layers
from strategies.search.formulas import FORMULAS
from strategies.search.shortest import NEVER
from strategies.search.space import Combination

Values = NDArray[Any]
"""[axis of each letter]: S, ways to shard and offload; F, families of combinations that differ in S alone;
K, a family's groups; N, groups that are alike whatever S; L, one entry for each number of layers, from 1."""

PRICES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Of a layer, in its mean forward seconds: the Lagrangian's multipliers that are tried."""


@dataclass(frozen=True, slots=True)
class Groups:
    """All groups of some families. ``places_FK``: which of the N they are, N where a family has fewer."""

    sizes_N: Values
    chunks_N: Values
    held_NL: Values
    chunks_F: Values
    counts_F: Values
    places_FK: Values

    def of(self, values_N: Values, otherwise: float) -> Values:
        """[..., F, K] of [..., N]."""
        padding = np.full((*values_N.shape[:-1], 1), otherwise, dtype=values_N.dtype)
        return np.concatenate([values_N, padding], axis=-1)[..., self.places_FK]


class Bounds:
    """Of one problem, in one form. ``limit`` and ``recompute`` are as in ``StageTables``."""

    def __init__(self, problem: Problem, limit: int | None, recompute: tuple[int, ...] | None) -> None:
        self._problem, self._limit, self._recompute = problem, limit, recompute
        layers = problem.layers
        self._layers_L = np.arange(1, layers + 1)
        again = np.zeros(layers, dtype=bool)
        again[list(recompute or ())] = True
        settled = np.where(again, problem.again, 0.0) / problem.speed
        self._settled = float(settled.sum())
        kept = np.diff(problem.kept) - np.where(again, problem.saved, 0)
        inputs = np.asarray([problem.input_bytes(first) for first in range(layers)])
        self._parameters_L = self._least(problem.parameters)
        self._kept_L = self._least([0, *kept.cumsum()], inputs)
        self._settled_L = self._least([0.0, *settled.cumsum()])

    def least(self, combinations: Sequence[Combination]) -> list[float]:
        """Seconds of each of ``combinations``; infinite where nothing fits."""
        least: dict[Combination, float] = {}
        for splits in (False, True):
            some = [each for each in combinations if FORMULAS[each.strategy.schedule].splits == splits]
            if some:
                least.update(zip(some, self._of(some, splits=splits), strict=True))
        return [least[each] for each in combinations]

    def memory_bytes(self, combinations: Sequence[Combination]) -> list[float]:
        """The fullest worker of each of ``combinations`` has no less, whatever is cut and computed again."""
        families, ways, places = _apart(combinations)
        groups = self._groups(families)
        kept_NL = groups.held_NL * self._kept_L
        if self._recompute is None:
            largest_L, most_L, *_ = self._savings
            kept_NL = np.minimum(kept_NL, groups.held_NL * (self._kept_L - most_L) + largest_L)
        bytes_SNL = self._resident(ways, groups) + kept_NL
        least_SF = self._least_maximum(bytes_SNL.astype(np.float64), groups).tolist()
        return [least_SF[s][f] for s, f in places]

    def _of(self, combinations: Sequence[Combination], *, splits: bool) -> list[float]:
        problem, pace = self._problem, self._problem.speed
        families, ways, places = _apart(combinations)
        groups = self._groups(families)
        rounds_N = problem.rounds(combinations[0], groups.sizes_N)
        rate_SN = np.asarray([problem.sent_bytes(each, groups.sizes_N, 1) for each in ways])
        rate_SN = rate_SN / problem.costs.link_bytes_per_second
        extra_SNL = self._extra(ways, groups) / pace
        extra_SF = self._total(extra_SNL, groups)
        fits_SNL, fits_SF = extra_SNL < NEVER, extra_SF < NEVER
        extra_SNL, extra_SF = np.where(fits_SNL, extra_SNL, 0.0), np.where(fits_SF, extra_SF, 0.0)

        inputs, weights = (np.asarray(each) for each in (problem.split if splits else problem.whole))
        both, weighing = (np.asarray(problem.forward) + inputs) / pace, weights / pace
        total_SF = both[-1] + weighing[-1] + extra_SF
        if splits:
            fill_SF = np.maximum(both[-1] - weighing[-1] + extra_SF, 0.0)
            fills_SF = problem.split_fill(combinations[0]) + extra_SF
        else:
            fill_SF = fills_SF = total_SF / groups.chunks_F

        # the slowest stage takes no less than their mean weighed by 1 / rounds
        fewest_F = groups.of(rounds_N, np.iinfo(np.int64).max).min(axis=1)
        sent_SF = groups.of(rate_SN / rounds_N, NEVER).min(axis=2) * problem.parameters[-1]
        beyond_SF = np.maximum(total_SF - fills_SF / fewest_F, 0.0) + sent_SF
        slowest_SF = beyond_SF / groups.of(1.0 / rounds_N, 0.0).sum(axis=1)

        # and no less than it would if they were cut for that alone
        both_L, weighing_L = self._least(both), self._least(weighing)
        rounds_N1, chunks_N1 = rounds_N[:, None], groups.chunks_N[:, None]
        if splits:
            gradient_SNL = both_L + extra_SNL
            fill_at_most_SNL = (rounds_N1 - 1) * gradient_SNL + (rounds_N1 + 1) * weighing_L
            least_SNL = chunks_N1 * np.minimum(rounds_N1 * (gradient_SNL + weighing_L), fill_at_most_SNL)
        else:
            least_SNL = (chunks_N1 * rounds_N1 - 1) * (both_L + weighing_L + extra_SNL)
        least_SNL += rate_SN[:, :, None] * (chunks_N1 * self._parameters_L)
        least_SNL[~fits_SNL] = NEVER
        slowest_SF = np.maximum(slowest_SF, self._least_maximum(least_SNL, groups))
        crossing_F = (groups.chunks_F * groups.counts_F - 1) * problem.least_crossing
        least_SF = np.where(fits_SF, fill_SF + slowest_SF + crossing_F, NEVER).tolist()
        return [least_SF[s][f] for s, f in places]

    def _least_maximum(self, values_SNL: Values, groups: Groups) -> Values:
        """[S, F]: of stages that take so much by their number of layers the one that takes most takes no
        less: if none takes more they must have all layers between them."""
        values_SNL = np.minimum.accumulate(values_SNL[:, :, ::-1], axis=2)[:, :, ::-1]
        most_SF: Values = groups.of(values_SNL[:, :, 0], -NEVER).max(axis=2)
        padded_SNL = np.concatenate([values_SNL, np.full_like(values_SNL[:, :1], NEVER)], axis=1)
        for chunks in dict.fromkeys(groups.chunks_F.tolist()):
            some_F = groups.chunks_F == chunks
            all_SFX = padded_SNL[:, groups.places_FK[some_F]].reshape(len(values_SNL), int(some_F.sum()), -1)
            enough = -(-self._problem.layers // chunks) - 1
            least_SF = np.partition(all_SFX, enough, axis=2)[:, :, enough]
            most_SF[:, some_F] = np.maximum(most_SF[:, some_F], least_SF)
        return most_SF

    def _groups(self, families: Sequence[Combination]) -> Groups:
        kinds: dict[object, int] = {}
        sizes, chunks, held, rows = [], [], [], []
        plenty = self._limit is None
        for combination in families:
            row = []
            of_chunks = combination.strategy.chunks
            shortest = 1 if combination.stages > 1 else self._problem.layers
            for k, size in enumerate(combination.sizes):
                of_group, key = (0, 0) if plenty else self._problem.held_by_layers(combination, k, shortest)
                kind = size, of_chunks, key
                if kind not in kinds:
                    kinds[kind] = len(kinds)
                    sizes.append(size)
                    chunks.append(of_chunks)
                    held.append(of_group)
                row.append(kinds[kind])
            rows.append(row)
        held_NL = np.empty((len(kinds), len(self._layers_L)), dtype=np.int64)
        for held_L, of_kind in zip(held_NL, held, strict=True):
            held_L[:] = of_kind
        counts = [len(row) for row in rows]
        return Groups(
            np.asarray(sizes),
            np.asarray(chunks),
            held_NL,
            np.asarray([each.strategy.chunks for each in families]),
            np.asarray(counts),
            np.asarray([row + [len(kinds)] * (max(counts) - len(row)) for row in rows]),
        )

    def _extra(self, ways: Sequence[Combination], groups: Groups) -> Values:
        """Least forward seconds, at speed 1, that are computed again, [S, N, L]; infinite where nothing
        fits."""
        if self._limit is None:
            shape = len(ways), *groups.held_NL.shape
            return np.broadcast_to(self._settled_L * self._problem.speed, shape)
        held_NL = groups.held_NL
        room_SNL = self._limit - self._resident(ways, groups)
        fits_SNL = held_NL * self._kept_L <= room_SNL
        if self._recompute is not None:
            return np.where(fits_SNL, self._settled_L * self._problem.speed, NEVER)
        largest_L, most_L, seconds_of, saved_of, by_count, most = self._savings
        extra_SNL = np.zeros(fits_SNL.shape)
        s_X, n_X, l_X = np.nonzero(~fits_SNL)  # few, where memory is in plenty
        room_X = room_SNL[s_X, n_X, l_X] - largest_L[l_X]
        needed_X = np.maximum(self._kept_L[l_X] - room_X // held_NL[n_X, l_X], 1)
        by_share_X = np.interp(needed_X, saved_of, seconds_of)
        counts_X = np.minimum(-(-needed_X // max(most, 1)), len(by_count) - 1)
        extra_X = np.maximum(by_share_X, by_count[counts_X])
        extra_SNL[s_X, n_X, l_X] = np.where(needed_X <= most_L[l_X], extra_X, NEVER)
        return extra_SNL

    def _resident(self, ways: Sequence[Combination], groups: Groups) -> Values:
        """Bytes beside activations, [S, N, L]."""
        problem, resident = self._problem, []
        parameters_NL = groups.chunks_N[:, None] * self._parameters_L
        for each in ways:
            consecutive_L = np.minimum(self._layers_L, streamed_layers(each.strategy))
            widest_L = self._parameters_L[consecutive_L - 1]
            of_way = problem.resident(each, groups.sizes_N[:, None], parameters_NL, widest_L)
            resident.append(np.broadcast_to(of_way, parameters_NL.shape))
        return np.asarray(resident)

    @cached_property
    def _savings(self) -> tuple[Values, Values, Values, Values, Values, int]:
        """(the least that the largest layer saves and the most that all save, [L]; the least seconds in which
        these bytes are saved, parts of layers counted; the least of so many layers; the most that one
        saves)."""
        saved, again = np.asarray(self._problem.saved), np.asarray(self._problem.again)
        saves = saved > 0
        order = np.argsort(again[saves] / saved[saves], kind="stable")
        seconds_of = np.concatenate(([0.0], again[saves][order].cumsum()))
        saved_of = np.concatenate(([0], saved[saves][order].cumsum()))
        by_count = np.concatenate(([0.0], np.sort(again[saves]).cumsum()))
        most_L = -self._least([0, *(-saved).cumsum()])
        return np.sort(saved), most_L, seconds_of, saved_of, by_count, int(saved.max())

    def _total(self, extra_SNL: Values, groups: Groups) -> Values:
        """Least seconds that all stages together compute again, [S, F]."""
        shape = len(extra_SNL), len(groups.places_FK)
        if self._limit is None or self._recompute is not None or not extra_SNL.any():
            return np.full(shape, self._settled)
        mean = float(np.mean(self._problem.again)) / self._problem.speed
        total_SF = np.zeros(shape)
        for price in PRICES:
            beside_SN = (extra_SNL - price * mean * self._layers_L).min(axis=2)
            beside_SF = groups.chunks_F * groups.of(beside_SN, 0.0).sum(axis=2)
            np.maximum(total_SF, beside_SF + price * mean * self._problem.layers, out=total_SF)
        return total_SF

    def _least(self, before: Any, first: Any = 0) -> Values:
        """The least sum of a range of so many layers and of what comes with its first, [L], from sums over
        all layers before each."""
        before = np.asarray(before)
        layers = len(before) - 1
        beyond = np.full(layers - 1, NEVER if before.dtype.kind == "f" else np.iinfo(np.int64).max // 2)
        after_LF = sliding_window_view(np.concatenate((before[1:], beyond)), layers)
        least_L: Values = (after_LF - before[:-1] + first).min(axis=1)
        return least_L


def _apart(
    combinations: Sequence[Combination],
) -> tuple[list[Combination], list[Combination], list[tuple[int, int]]]:
    """(one of each family, one of each way to shard and offload, the places of each combination in those: way
    and family)."""
    families: dict[object, tuple[int, Combination]] = {}
    ways: dict[object, tuple[int, Combination]] = {}
    places = []
    for each in combinations:
        strategy = each.strategy
        s, _ = ways.setdefault((strategy.sharding, strategy.offload), (len(ways), each))
        family = strategy.schedule, strategy.chunks, each.sizes
        f, _ = families.setdefault(family, (len(families), each))
        places.append((s, f))
    return [each for _, each in families.values()], [each for _, each in ways.values()], places
