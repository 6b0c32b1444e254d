"""Where to cut the layers and which to compute again: the least step within memory, by dynamic programming.

In the manner of Galvatron (Miao et al., "Galvatron: Efficient Transformer Training over Multiple GPUs Using
Automatic Parallelism", VLDB'23, sec. 4): an outer loop over combinations, and for each a programme over
layers. A step is a sum over stages and a maximum over stages (``cost``), so the programme minimises the sum
under a limit for the maximum, and the limit is lowered until nothing better can come: exactly the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.search.cost import Evaluation, Matrix, Problem, evaluate, stage_seconds, timed
from strategies.search.formulas import FORMULAS
from strategies.search.recomputation import Staircases
from strategies.search.space import Combination

NEVER = np.inf


@dataclass(frozen=True, slots=True)
class Choice:
    """A combination with its cut and its recomputed layers, and what it costs."""

    combination: Combination
    bounds: tuple[int, ...]
    recompute: tuple[int, ...]
    cost: Evaluation


@dataclass
class CutSearch:
    """``best`` of every combination of one problem; what they share is worked out once.

    ``limit``: bytes a worker has (None: plenty). ``recompute``: those layers and no others; None: as needed.
    ``tolerance``: by how much, relatively, a choice may be worse than the best; 0.0: it is the best.
    """

    problem: Problem
    limit: int | None
    recompute: tuple[int, ...] | None = None
    tolerance: float = 0.0
    _staircases: Staircases | None = None
    _tables: dict[tuple[object, ...], tuple[Matrix, Matrix]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problem = self.problem
        firsts = range(problem.layers + 1)
        self._crossing_F = np.asarray([problem.crossing_seconds(first) for first in firsts])
        self._inputs_F = np.asarray([problem.input_bytes(first) for first in firsts], dtype=np.int64)
        self._largest_FS = _largest(problem.saved)
        self._widest_FS = _widest(problem.layer_parameters)
        self._parameters_FS = _of_ranges(problem.parameters)
        self._kept_FS = _of_ranges(problem.kept) + self._inputs_F[:, None]
        self._span_FS = np.maximum(_of_ranges(list(firsts)), 0)
        self._forward_FS = _of_ranges(problem.forward)
        self._split_FS = _of_ranges(problem.split[0]), _of_ranges(problem.split[1])
        self._whole_FS = _of_ranges(problem.whole[0]), _of_ranges(problem.whole[1])

    def relaxed(self, combination: Combination) -> Choice:
        """The least step of this combination where memory is plenty: no other can be shorter."""
        cut = self._cut(combination, None, limited=False)
        assert cut is not None, "with memory in plenty there is a cut"
        recompute = self.recompute or ()
        return Choice(combination, cut[1], recompute, evaluate(self.problem, combination, cut[1], recompute))

    def best(self, combination: Combination, relaxed: Choice | None = None) -> Choice | None:
        """The least step of this combination; None where no cut fits the memory. ``relaxed`` of it may be
        given."""
        plenty = relaxed or self.relaxed(combination)
        if self.limit is None or plenty.cost.memory_bytes <= self.limit:
            return plenty
        if self._least_memory(combination) > self.limit:
            return None
        # where all may keep as much as the first stage does, that is taken as little, which bounds the rest
        cut = self._cut(combination, None, limited=True)
        if cut is None:
            return None
        found = self._priced(combination, cut[1])
        if found is not None:
            return found
        best: tuple[float, tuple[int, ...]] | None = None
        for least, length in self._first_lengths(combination):
            if best is not None and least >= best[0] * (1 - self.tolerance):
                break
            cut = self._cut(combination, length, limited=True)
            best = cut if best is None or (cut is not None and cut < best) else best
        return None if best is None else self._priced(combination, best[1])

    def fits(self, combination: Combination) -> bool:
        """Whether any cut fits the memory; of a schedule that splits backward it only may."""
        stages = [self._stage(combination, k, None, limited=True) for k in range(combination.stages)]
        return bool(np.isfinite(_least_maximum(*zip(*stages, strict=True))))

    def _least_memory(self, combination: Combination) -> float:
        """Bytes that the fullest worker has at least, all stages being equal and everything recomputed."""
        problem, chunks, groups = self.problem, combination.strategy.chunks, range(len(combination.sizes))
        resident = min(problem.resident(combination, k, chunks * problem.parameters[-1], 0) for k in groups)
        held = min(problem.held(combination, k, problem.layers, 1) for k in groups)
        outputs = problem.kept[-1] - sum(problem.saved)
        return float(resident + held * outputs / combination.strategy.sequence) / combination.stages

    def _priced(self, combination: Combination, bounds: tuple[int, ...]) -> Choice | None:
        """The best choice with this cut; None where it does not fit."""
        assert self.limit is not None
        recompute = self._recomputed(combination, bounds)
        if recompute is None:
            return None
        cost = evaluate(self.problem, combination, bounds, recompute)
        return Choice(combination, bounds, recompute, cost) if cost.memory_bytes <= self.limit else None

    def _first_lengths(self, combination: Combination) -> list[tuple[float, int]]:
        """Every length of the first stage, with what a step takes at least with it, the least first."""
        problem, rest = self.problem, range(1, len(combination.sizes))
        total = stage_seconds(problem, combination, 0, problem.layers)
        rates = sum(1 / problem.rounds(combination, k) for k in rest)
        lengths = []
        for length in range(1, problem.layers - len(rest) + 1):
            own = sum(stage_seconds(problem, combination, 0, length))
            lengths.append((max(problem.rounds(combination, 0) * own, (sum(total) - own) / rates), length))
        return sorted(lengths)

    def _cut(
        self, combination: Combination, first_length: int | None, *, limited: bool
    ) -> tuple[float, tuple[int, ...]] | None:
        stages = [
            self._stage(combination, k, first_length, limited=limited) for k in range(combination.stages)
        ]
        return least_sum_and_maximum(
            [added for added, _ in stages], [beyond for _, beyond in stages], self.tolerance
        )

    def _recomputed(self, combination: Combination, bounds: tuple[int, ...]) -> tuple[int, ...] | None:
        if self.recompute is not None:
            return self.recompute
        layers: tuple[int, ...] = ()
        for k, (first, stop) in enumerate(pairwise(bounds)):
            needed = int(self._needed(combination, k, bounds[1])[first, stop])
            if needed > self._staircase().most(first, stop):
                return None
            layers += self._staircase().layers(first, stop, needed)
        return layers

    def _staircase(self) -> Staircases:
        if self._staircases is None:
            self._staircases = Staircases(self.problem.saved, self.problem.costs.forward_seconds)
        return self._staircases

    def _stage(
        self, combination: Combination, k: int, first_length: int | None, *, limited: bool
    ) -> tuple[Matrix, Matrix]:
        """(seconds added, seconds beyond) of stage k for every range of layers."""
        strategy, last = combination.strategy, combination.stages - 1
        memory = (combination.sizes, k % len(combination.sizes), first_length) if limited else ()
        key = (strategy, combination.size(k), memory)
        if key not in self._tables:
            self._tables[key] = self._timed(combination, k, first_length, limited=limited)
        added_FS, beyond_FS = self._tables[key]
        # only the first stage begins with the first layer, only the last one ends with the last
        firsts = slice(0, 1) if k == 0 else slice(1, None)
        stops = slice(-1, None) if k == last else slice(1, -1)
        if k == 0 and first_length is not None and last > 0:
            stops = slice(first_length, first_length + 1)
        masked_FS = np.full_like(added_FS, NEVER)
        masked_FS[firsts, stops] = added_FS[firsts, stops]
        return masked_FS, beyond_FS

    def _timed(
        self, combination: Combination, k: int, first_length: int | None, *, limited: bool
    ) -> tuple[Matrix, Matrix]:
        problem, strategy, pace = self.problem, combination.strategy, self.problem.pace(combination)
        inputs_FS, weights_FS = self._split_FS if FORMULAS[strategy.schedule].splits else self._whole_FS
        extra_FS = self._extra(combination, k, first_length, limited=limited) / pace
        seconds = (self._forward_FS / pace, inputs_FS / pace, weights_FS / pace)
        with np.errstate(invalid="ignore"):  # an infinite extra: the stage does not fit
            added_FS, beyond_FS, _ = timed(problem, combination, k, seconds, extra_FS)
        sent_FS = problem.sent_bytes(combination, k, strategy.chunks * self._parameters_FS)
        usable_FS = (self._span_FS > 0) & np.isfinite(extra_FS)
        return (
            np.where(usable_FS, added_FS + self._crossing_F[:, None], NEVER),
            np.where(usable_FS, beyond_FS + sent_FS / problem.costs.link_bytes_per_second, NEVER),
        )

    def _extra(self, combination: Combination, k: int, first_length: int | None, *, limited: bool) -> Matrix:
        """Forward seconds that are computed again at speed 1; infinite where memory does not suffice."""
        problem = self.problem
        if self.recompute is not None:
            again = np.zeros(problem.layers)
            again[list(self.recompute)] = np.asarray(problem.costs.forward_seconds)[list(self.recompute)]
            before = np.concatenate(([0.0], again.cumsum()))
            extra_FS: Matrix = before[None, :] - before[:, None]
            if not limited:
                return extra_FS
            needed_FS = self._needed(combination, k, first_length)
            saved = np.zeros(problem.layers, dtype=np.int64)
            saved[list(self.recompute)] = np.asarray(problem.saved, dtype=np.int64)[list(self.recompute)]
            total = np.concatenate(([0], saved.cumsum()))
            return np.where(total[None, :] - total[:, None] >= needed_FS, extra_FS, NEVER)
        if not limited:
            return np.zeros((problem.layers + 1, problem.layers + 1))
        needed_FS = self._needed(combination, k, first_length)
        return self._staircase().least_seconds(needed_FS)

    def _needed(self, combination: Combination, k: int, first_length: int | None) -> NDArray[np.int64]:
        """Bytes that must be saved per micro-batch so that a stage fits, [first layer, stop layer]."""
        assert self.limit is not None
        problem, strategy = self.problem, combination.strategy
        lengths_FS = np.maximum(self._span_FS, 1)
        firsts_FS = lengths_FS if k == 0 else first_length or 1
        held_FS = problem.held(combination, k, lengths_FS, firsts_FS)
        parameters_FS = strategy.chunks * np.maximum(self._parameters_FS, 0)
        room_FS = self.limit - problem.resident(combination, k, parameters_FS, self._widest_FS)
        plain = -(-held_FS * self._kept_FS // strategy.sequence) <= room_FS
        working_FS = -(-self._largest_FS // strategy.sequence)
        needed_FS = self._kept_FS - (room_FS - working_FS) * strategy.sequence // held_FS
        saving_FS: NDArray[np.int64] = np.where(plain | (self._span_FS == 0), 0, np.maximum(needed_FS, 1))
        return saving_FS


def _of_ranges(before: Sequence[float]) -> NDArray[Any]:
    """Sums over layers, [first layer, stop layer], from those over all layers before each."""
    before_L = np.asarray(before)
    ranges_FS: NDArray[Any] = before_L[None, :] - before_L[:, None]
    return ranges_FS


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


def least_sum_and_maximum(
    added: Sequence[Matrix], beyond: Sequence[Matrix], tolerance: float = 0.0
) -> tuple[float, tuple[int, ...]] | None:
    """The bounds with the least sum(added) + max(beyond) over stages, and that; None where nothing is finite.

    ``added[k][first, stop]`` and ``beyond[k]`` likewise. Under a limit for the maximum the least sum is a
    shortest path, O(K L^2), which does not rise with the limit. So the limits between
    two whose sums are known cost at least the upper one's sum and the lower limit: intervals are halved
    until none can hold anything better by more than ``tolerance``, relatively.
    """
    lowest = _least_maximum(added, beyond)
    if not np.isfinite(lowest):
        return None
    tightest, freest = _shortest(added, beyond, lowest), _shortest(added, beyond, NEVER)
    assert tightest is not None and freest is not None, "the least maximum can be reached"
    best = min((each[0] + each[1], each[2]) for each in (tightest, freest))
    highest = best[0] - freest[0]  # a maximum above this is no better, whatever the sum
    close = max(tolerance, ALIKE)
    if not lowest < highest or freest[0] + lowest >= best[0] * (1 - close):
        return best
    usable = [b[np.isfinite(a) & (b > lowest) & (b < highest)] for a, b in zip(added, beyond, strict=True)]
    limits = [lowest, *np.unique(np.concatenate(usable)).tolist(), highest]
    intervals = [(freest[0] + lowest, 0, len(limits) - 1, freest[0])]
    while intervals:
        bound, low, high, least = heappop(intervals)
        if bound >= best[0] * (1 - close):
            break
        middle = (low + high) // 2
        if middle == low:
            continue
        found = _shortest(added, beyond, limits[middle])
        assert found is not None, "a higher limit allows what a lower one does"
        best = min(best, (found[0] + found[1], found[2]))
        heappush(intervals, (found[0] + limits[low], low, middle, found[0]))
        heappush(intervals, (least + limits[middle], middle, high, least))
    return best


ALIKE = 1e-12
"""Relative: sums that differ by less are the same, added up in another order."""


def _shortest(
    added: Sequence[Matrix], beyond: Sequence[Matrix], limit: float
) -> tuple[float, float, tuple[int, ...]] | None:
    """(sum, maximum, bounds) of the least sum with no maximum above ``limit``."""
    index = np.arange(len(added[0]))
    reach = np.full(len(index), NEVER)
    reach[0] = 0.0
    origins = []
    for added_FS, beyond_FS in zip(added, beyond, strict=True):
        through = reach[:, None] + added_FS
        if limit < NEVER:
            through[beyond_FS > limit] = NEVER
        origin = through.argmin(axis=0)
        reach = through[origin, index]
        origins.append(origin)
    if not np.isfinite(reach[-1]):
        return None
    bounds = [len(index) - 1]
    for origin in reversed(origins):
        bounds.append(int(origin[bounds[-1]]))
    bounds.reverse()
    most = max(float(each[a, b]) for each, (a, b) in zip(beyond, pairwise(bounds), strict=True))
    return float(reach[-1]), most, tuple(bounds)


def _least_maximum(added: Sequence[Matrix], beyond: Sequence[Matrix]) -> float:
    reach = np.full(len(added[0]), NEVER)
    reach[0] = -NEVER
    for added_FS, beyond_FS in zip(added, beyond, strict=True):
        usable = np.where(np.isfinite(added_FS), beyond_FS, NEVER)
        reach = np.maximum(reach[:, None], usable).min(axis=0)
    return float(reach[-1])
