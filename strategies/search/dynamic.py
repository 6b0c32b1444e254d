"""Where to cut the layers and which to compute again: the least step within memory, by dynamic programming.

In the manner of Galvatron (Miao et al., "Galvatron: Efficient Transformer Training over Multiple GPUs Using
Automatic Parallelism", VLDB'23, sec. 4): an outer loop over combinations, and for each a programme over
layers. A step is a sum over stages and a maximum over stages (``cost``), so the programme minimises the sum
under a limit for the maximum, and the limit is lowered until nothing better can come: exactly the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from strategies.search.cost import Evaluation, Matrix, Problem, evaluate, stage_seconds, timed
from strategies.search.formulas import FORMULAS
from strategies.search.memory import SHARDINGS
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
    """

    problem: Problem
    limit: int | None
    recompute: tuple[int, ...] | None = None
    _staircases: Staircases | None = None
    _tables: dict[tuple[object, ...], tuple[Matrix, Matrix, Matrix]] = field(default_factory=dict)

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
        # a zero-bubble worker may keep what the first stage keeps: that is given, one length at a time
        lengths: Sequence[int | None] = (None,)
        if FORMULAS[combination.strategy.schedule].splits and len(combination.sizes) > 1:
            lengths = range(1, self.problem.layers - len(combination.sizes) + 2)
        cuts = [self._cut(combination, length, limited=True) for length in lengths]
        bounds = min((cut for cut in cuts if cut is not None), default=(0.0, None))[1]
        if bounds is None:
            return None
        recompute = self._recomputed(combination, bounds)
        cost = evaluate(self.problem, combination, bounds, recompute)
        assert cost.memory_bytes <= self.limit, "the programme and the cost model agree"
        return Choice(combination, bounds, recompute, cost)

    def _cut(
        self, combination: Combination, first_length: int | None, *, limited: bool
    ) -> tuple[float, tuple[int, ...]] | None:
        stages = [
            self._stage(combination, k, first_length, limited=limited) for k in range(combination.stages)
        ]
        return least_sum_and_maximum([added for added, _ in stages], [beyond for _, beyond in stages])

    def _recomputed(self, combination: Combination, bounds: tuple[int, ...]) -> tuple[int, ...]:
        if self.recompute is not None:
            return self.recompute
        layers: tuple[int, ...] = ()
        for k, (first, stop) in enumerate(pairwise(bounds)):
            needed = self._needed(combination, k, bounds[1])[first, stop]
            layers += self._staircase().layers(first, stop, int(needed))
        return layers

    def _staircase(self) -> Staircases:
        if self._staircases is None:
            self._staircases = Staircases(self.problem.saved, self.problem.costs.forward_seconds)
        return self._staircases

    def _stage(
        self, combination: Combination, k: int, first_length: int | None, *, limited: bool
    ) -> tuple[Matrix, Matrix]:
        """(seconds added, seconds beyond) of stage k for every range of layers."""
        strategy, size, last = combination.strategy, combination.size(k), combination.stages - 1
        memory = (strategy.sharding, k % len(combination.sizes), combination.sizes, first_length) if limited else ()
        key = (strategy.schedule, strategy.chunks, strategy.sequence, size, *memory)
        if key not in self._tables:
            self._tables[key] = self._timed(combination, k, first_length, limited=limited)
        added_FS, beyond_FS, parameters_FS = self._tables[key]
        problem = self.problem
        sharding = SHARDINGS[strategy.sharding]
        rate = strategy.chunks * sharding.sent_bytes(1 << 20, size) / (1 << 20) / problem.costs.link_bytes_per_second
        crossing_F = [problem.crossing_seconds(first) for first in range(problem.layers + 1)]
        added_FS = added_FS + np.asarray(crossing_F)[:, None]
        # only the first stage begins with the first layer, only the last one ends with the last
        if k > 0:
            added_FS[0] = NEVER
        if k < last:
            added_FS[:, -1] = NEVER
        if k == 0 and first_length is not None:
            kept = added_FS[0, first_length]
            added_FS[0] = NEVER
            added_FS[0, first_length] = kept
        return added_FS, beyond_FS + parameters_FS * rate

    def _timed(
        self, combination: Combination, k: int, first_length: int | None, *, limited: bool
    ) -> tuple[Matrix, Matrix, Matrix]:
        problem, layers = self.problem, self.problem.layers
        index = np.arange(layers + 1)
        valid_FS = index[None, :] > index[:, None]
        extra_FS = self._extra(combination, k, first_length, limited=limited) / problem.pace(combination)
        forward, inputs, weights = (
            np.asarray([stage_seconds(problem, combination, 0, stop)[part] for stop in index])
            for part in range(3)
        )
        seconds = tuple(each[None, :] - each[:, None] for each in (forward, inputs, weights))
        with np.errstate(invalid="ignore"):
            added_FS, beyond_FS, _ = timed(problem, combination, k, (seconds[0], seconds[1], seconds[2]), extra_FS)
        valid_FS &= np.isfinite(extra_FS)
        parameters = np.asarray(problem.parameters, dtype=np.float64)
        return (
            np.where(valid_FS, added_FS, NEVER),
            np.where(valid_FS, beyond_FS, NEVER),
            parameters[None, :] - parameters[:, None],
        )

    def _extra(
        self, combination: Combination, k: int, first_length: int | None, *, limited: bool
    ) -> Matrix:
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
        if not (needed_FS[np.triu_indices(problem.layers + 1, 1)] > 0).any():
            return np.zeros_like(needed_FS, dtype=np.float64)
        return self._staircase().least_seconds(needed_FS)

    def _needed(self, combination: Combination, k: int, first_length: int | None) -> NDArray[np.int64]:
        """Bytes that must be saved per micro-batch so that a stage fits, [first layer, stop layer]."""
        assert self.limit is not None
        problem, strategy = self.problem, combination.strategy
        layers = problem.layers
        index = np.arange(layers + 1)
        parameters = strategy.chunks * np.asarray(problem.parameters, dtype=np.int64)
        resident_FS = _resident(problem, combination, k, parameters[None, :] - parameters[:, None])
        kept = np.asarray(problem.kept, dtype=np.int64)
        inputs = np.asarray([problem.input_bytes(first) for first in index], dtype=np.int64)
        kept_FS = kept[None, :] - kept[:, None] + inputs[:, None]
        held_N = np.ones(layers + 1, dtype=np.int64)
        for length in range(1, layers + 1):
            first = length if k == 0 or first_length is None else first_length
            held_N[length] = problem.held(combination, k, length, first)
        span_FS = np.maximum(index[None, :] - index[:, None], 0)
        held_FS = held_N[span_FS]
        room_FS = self.limit - resident_FS
        plain = -(-held_FS * kept_FS // strategy.sequence) <= room_FS
        working_FS = -(-_largest(problem.saved) // strategy.sequence)
        needed_FS = kept_FS - (room_FS - working_FS) * strategy.sequence // held_FS
        return np.where(plain, 0, np.maximum(needed_FS, 1))


def _resident(
    problem: Problem, combination: Combination, k: int, parameters_FS: NDArray[np.int64]
) -> NDArray[np.int64]:
    values, where = np.unique(np.maximum(parameters_FS, 0), return_inverse=True)
    bytes_ = [problem.resident(combination, k, int(value)) for value in values]
    return np.asarray(bytes_, dtype=np.int64)[where].reshape(parameters_FS.shape)


def _largest(saved: Sequence[int]) -> NDArray[np.int64]:
    """The largest of a range, [first layer, stop layer]."""
    size = len(saved) + 1
    largest = np.zeros((size, size), dtype=np.int64)
    for first in range(size - 1):
        largest[first, first + 1 :] = np.maximum.accumulate(np.asarray(saved[first:], dtype=np.int64))
    return largest


def least_sum_and_maximum(
    added: Sequence[Matrix], beyond: Sequence[Matrix]
) -> tuple[float, tuple[int, ...]] | None:
    """The bounds with the least sum(added) + max(beyond) over stages, and that; None where nothing is finite.

    ``added[k][first, stop]`` and ``beyond[k]`` likewise. Under a limit for the maximum the least sum is a
    shortest path, O(K L^2); solutions come with falling maxima and rising sums, until the sum and the least
    maximum that there can be are together no better than what is known.
    """
    first = _shortest(added, beyond, NEVER)
    if first is None:
        return None
    lowest = _least_maximum(added, beyond)
    best = first[0] + first[1], first[2]
    solution: tuple[float, float, tuple[int, ...]] | None = first
    while solution is not None and solution[0] + lowest < best[0]:
        limit = min(float(np.nextafter(solution[1], -NEVER)), best[0] - solution[0])
        solution = _shortest(added, beyond, limit)
        if solution is not None and solution[0] + solution[1] < best[0]:
            best = solution[0] + solution[1], solution[2]
    return best


def _shortest(
    added: Sequence[Matrix], beyond: Sequence[Matrix], limit: float
) -> tuple[float, float, tuple[int, ...]] | None:
    """(sum, maximum, bounds) of the least sum with no maximum above ``limit``."""
    index = np.arange(len(added[0]))
    reach = np.full(len(index), NEVER)
    reach[0] = 0.0
    origins = []
    for added_FS, beyond_FS in zip(added, beyond, strict=True):
        through = np.where(beyond_FS <= limit, reach[:, None] + added_FS, NEVER)
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
