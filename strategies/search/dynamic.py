"""Where to cut the layers and which to compute again: the least step within memory, by dynamic programming.

In the manner of Galvatron (Miao et al., "Galvatron: Efficient Transformer Training over Multiple GPUs Using
Automatic Parallelism", VLDB'23, sec. 4): an outer loop over combinations, and for each a programme over
layers. A step is a sum over stages and a maximum over stages (``cost``), so the programme minimises the sum
under a limit for the maximum, and the limit is lowered until nothing better can come: exactly the best.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.search.cost import Evaluation, Problem, evaluate, least_seconds
from strategies.search.formulas import FORMULAS
from strategies.search.shortest import ALIKE, Matrix, least_sum_and_maximum
from strategies.search.space import Combination
from strategies.search.tables import StageTables
from strategies.search.teams import Form


@dataclass(frozen=True, slots=True)
class Choice:
    """A combination with its cut and its recomputed layers, and what it costs."""

    combination: Combination
    bounds: tuple[int, ...]
    recompute: tuple[int, ...]
    cost: Evaluation


@dataclass(frozen=True, slots=True)
class Branch:
    """Every cut of a combination whose first stage has one of ``lengths`` (from, to) layers. None takes less
    than ``bound`` seconds, which the one at ``bounds`` would take if workers kept as little as with the
    shortest first stage; where not ``limited``, with memory in plenty."""

    bound: float
    combination: Combination
    lengths: tuple[int, int]
    bounds: tuple[int, ...]
    limited: bool


class CutSearch:
    """The best cut of every combination of one problem, by branch and bound.

    ``limit``: bytes a worker has (None: plenty). ``recompute``: those layers and no others; None: as needed.
    ``tolerance``: by how much, relatively, a choice may be worse than the best; 0.0: it is the best.
    """

    def __init__(
        self,
        problem: Problem,
        limit: int | None,
        recompute: tuple[int, ...] | None = None,
        tolerance: float = 0.0,
    ) -> None:
        self._problem, self._limit, self._recompute = problem, limit, recompute
        self._tolerance = tolerance
        self._tables: dict[Form | None, StageTables] = {}
        self._kept: dict[Form | None, tuple[int, int]] = {}
        self._floors: dict[Combination, list[tuple[float, float]]] = {}

    def _tables_of(self, combination: Combination) -> StageTables:
        problem = self._problem.of(combination)
        if problem.form not in self._tables:
            self._tables[problem.form] = StageTables(problem, self._limit, self._recompute)
        return self._tables[problem.form]

    def _kept_of(self, combination: Combination) -> tuple[int, int]:
        """Bytes that all layers keep of a micro-batch, at most and at least."""
        problem = self._problem.of(combination)
        if problem.form not in self._kept:
            again = sum(problem.saved[layer] for layer in self._recompute or ())
            most = sum(problem.saved) if self._recompute is None else again
            self._kept[problem.form] = problem.kept[-1] - again, problem.kept[-1] - most
        return self._kept[problem.form]

    def least(self, combination: Combination) -> float:
        """Seconds that no cut of a combination takes less than, without looking at any."""
        extra = 0.0
        if self._limit is not None and self._recompute is None:
            kept, _ = self._kept_of(combination)
            resident, held, left = self._weighed(combination, kept)
            if min(resident) + min(held) > left and max(held) > 0:
                # as much of what is kept has to go, counted where it goes furthest
                least = (min(resident) + min(held) - left) / max(held) * kept
                extra = self._tables_of(combination).least_extra(int(least))
        return least_seconds(self._problem, combination, extra)

    def root(self, combination: Combination) -> list[Branch]:
        """All cuts of a combination as one branch; none where it cannot fit."""
        longest = self._problem.layers - combination.stages + 1
        lengths = (1, longest) if combination.stages > 1 else (longest, longest)
        # where not even the best share-out of what is kept fits, the cut with memory in plenty is no help
        return self._branch(
            combination, lengths, limited=not self._may_fit(combination, self._kept_of(combination)[0])
        )

    def settle(self, branch: Branch) -> Choice | list[Branch]:
        """The best of a branch, or smaller branches, none where nothing of it fits the memory."""
        problem, combination, bounds = self._problem, branch.combination, branch.bounds
        if not branch.limited:
            recompute = self._recompute or ()
            cost = evaluate(problem, combination, bounds, recompute)
            if self._limit is None or cost.memory_bytes <= self._limit:
                return Choice(combination, bounds, recompute, cost)
            return self._branch(combination, branch.lengths, limited=True)
        least, most = branch.lengths
        found = self._priced(combination, bounds)
        if found is not None and found.cost.step_seconds <= branch.bound * (1 + ALIKE):
            return found
        if bounds[1] == least or not FORMULAS[combination.strategy.schedule].by_first_stage:
            assert found is not None, "what the tables take for fitting fits"
            return found
        # the longer the first stage is, the more all others keep: say so for its longer half
        middle = (least + bounds[1] + 1) // 2
        halves = ((least, middle - 1), (middle, most))
        return [each for half in halves for each in self._branch(combination, half, limited=True)]

    def _branch(self, combination: Combination, lengths: tuple[int, int], *, limited: bool) -> list[Branch]:
        if limited and not self._may_fit(combination, self._kept_of(combination)[1]):
            return []
        cut = self._cut(combination, lengths, limited=limited)
        return [] if cut is None else [Branch(cut[0], combination, lengths, cut[1], limited)]

    def _cut(
        self, combination: Combination, lengths: tuple[int, int], *, limited: bool
    ) -> tuple[float, tuple[int, ...]] | None:
        added, beyond = zip(*self._stages(combination, lengths, limited=limited), strict=True)
        found = least_sum_and_maximum(added, beyond, self._tolerance)
        if found is None:
            return None
        seconds, path = found
        inner = path[:-1]
        bounds = (lengths[0] + inner[0], *(place + 1 for place in inner[1:])) if inner else ()
        return seconds, (0, *bounds, self._problem.layers)

    def _stages(
        self, combination: Combination, lengths: tuple[int, int], *, limited: bool
    ) -> list[tuple[Matrix, Matrix]]:
        """(seconds added, seconds beyond) of every stage, from each bound where it may begin to each where it
        may end. Only the first one begins with the first layer, only the last one ends with the last."""
        least, most = lengths
        stages, views = combination.stages, dict[tuple[object, ...], tuple[Matrix, Matrix]]()
        tables = self._tables_of(combination).seconds(combination, least, limited=limited)
        result = []
        for k in range(stages):
            firsts = slice(0, 1) if k == 0 else slice(least, most + 1) if k == 1 else slice(1, -1)
            stops = slice(-1, None) if k == stages - 1 else slice(least, most + 1) if k == 0 else slice(1, -1)
            added, beyond = tables[k % len(tables)]
            key = (id(added), k == 0, k == 1, k == stages - 1)
            if key not in views:  # one object for those that are the same: it is looked at once
                views[key] = (added[firsts, stops], beyond[firsts, stops])
            result.append(views[key])
        return result

    def _may_fit(self, combination: Combination, kept: int) -> bool:
        """Whether any cut may, of layers that keep so many bytes of a micro-batch together.

        A worker of stage s has at least r_s x + k_s y + i_s bytes, x and y being its shares of the parameters
        and of what is kept. Weighed by w_s, the sum over stages is no less than min(w r) + min(w k) +
        sum(w i) and, where all fit, no more than the limit's; the weights make all stages alike.
        """
        if self._limit is None:
            return True
        resident, held, left = self._weighed(combination, kept)
        return min(resident) + min(held) <= left

    def _weighed(self, combination: Combination, kept: int) -> tuple[list[float], list[float], float]:
        """(w r, w k) of a stage of every group, and what the limit leaves to all stages, weighed."""
        assert self._limit is not None
        resident, held, left, chunks = [], [], 0.0, combination.strategy.chunks
        least_input = self._problem.of(combination).least_input
        for k, (each, in_flight) in enumerate(self._floor(combination)):
            weight = 1 / max(each + in_flight * kept, 1.0)
            resident.append(weight * each)
            held.append(weight * in_flight * kept)
            left += chunks * weight * (self._limit - (in_flight * least_input if k else 0.0))
        return resident, held, left * (1 + 1e-9)

    def _floor(self, combination: Combination) -> list[tuple[float, float]]:
        """(bytes beside activations if it had the whole model, micro-batches that a worker keeps at least) of
        every group."""
        if combination not in self._floors:
            problem, strategy = self._problem.of(combination), combination.strategy
            all_, fine = strategy.chunks * problem.parameters[-1], 1 << 20  # what is rounded up is little
            resident = {
                size: float(problem.resident(combination, size, fine * all_, 0)) / fine
                for size in {*combination.sizes}
            }
            self._floors[combination] = [
                (resident[size], float(problem.held(combination, k, problem.layers, 1)))
                for k, size in enumerate(combination.sizes)
            ]
        return self._floors[combination]

    def _priced(self, combination: Combination, bounds: tuple[int, ...]) -> Choice | None:
        """The best choice with this cut; None where it does not fit."""
        assert self._limit is not None
        recompute = self._tables_of(combination).recomputed(combination, bounds)
        if recompute is None:
            return None
        cost = evaluate(self._problem, combination, bounds, recompute)
        return Choice(combination, bounds, recompute, cost) if cost.memory_bytes <= self._limit else None
