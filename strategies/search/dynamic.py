"""Where to cut the layers and which to compute again: the least step within memory, by dynamic programming.

In the manner of Galvatron (Miao et al., "Galvatron: Efficient Transformer Training over Multiple GPUs Using
Automatic Parallelism", VLDB'23, sec. 4): an outer loop over combinations, and for each a programme over
layers. A step is a sum over stages and a maximum over stages (``cost``), so the programme minimises the sum
under a limit for the maximum, and the limit is lowered until nothing better can come: exactly the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from runtime.grouping import grouped
from strategies.search.bounds import Bounds, bounds_of
from strategies.search.cost import Evaluation, Problem, evaluate, step_seconds
from strategies.search.formulas import FORMULAS
from strategies.search.shortest import (
    ALIKE,
    NEVER,
    Matrix,
    least_apart,
    least_sum_and_maximum,
)
from strategies.search.space import Combination
from strategies.search.tables import ManyTables, StageTables
from strategies.search.teams import Form, form_of

PARTS = 3
"""Into how many lengths of a first stage, or ranges of them, a branch is divided."""

BATCH, LARGEST_BATCH = 4, 32
"""Of how many branches at first and at most the bytes are looked at at once."""


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
    than ``bound`` seconds. ``limited``: the best one does not fit where recomputation is as with memory in
    plenty."""

    bound: float
    combination: Combination
    lengths: tuple[int, int]
    limited: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """The best cut of a branch, which takes ``bound`` seconds but for rounding."""

    bound: float
    combination: Combination
    bounds: tuple[int, ...]


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
        self._of_form: dict[Form | None, Bounds] = {}
        self._parts: dict[Combination, list[Branch]] = {}

    def _tables_of(self, combination: Combination) -> StageTables:
        problem = self._problem.of(combination)
        if problem.form not in self._tables:
            self._tables[problem.form] = StageTables(problem, self._limit, self._recompute)
        return self._tables[problem.form]

    def least(self, combinations: Sequence[Combination], enough: float = NEVER) -> list[float]:
        """Seconds that no cut of each combination takes less than, without looking at any; infinite where
        none fits, or takes less than ``enough``."""
        least = dict.fromkeys(combinations, NEVER)
        if self._limit is not None:
            bytes_ = self._problem.known.get("least bytes", {})
            combinations = [each for each in combinations if bytes_.get(each, 0) <= self._limit]
        for bounds, some in self._bounds(combinations):
            least.update(zip(some, bounds.least([(each, None) for each in some], enough), strict=True))
        return [*least.values()]

    def leanest(self, combinations: Sequence[Combination]) -> int:
        """The least bytes within which some combination has a cut that fits. ``limit`` does not matter."""
        bytes_: dict[Combination, float] = {}
        for bounds, some in self._bounds(combinations):
            bytes_.update(zip(some, bounds.memory_bytes(some), strict=True))
        self._problem.known["least bytes"] = bytes_
        waiting = [Branch(bound, each, self._lengths(each), limited=True) for each, bound in bytes_.items()]
        best, many = NEVER, BATCH
        while waiting:
            waiting.sort(key=lambda branch: -branch.bound)
            if waiting[-1].bound >= best:
                break
            looked_at = [waiting.pop() for _ in range(min(many, len(waiting)))]
            many = min(2 * many, LARGEST_BATCH)
            for branch in self._with_bytes(looked_at):
                if self._by_first_stage(branch):
                    lengths = range(branch.lengths[0], branch.lengths[1] + 1)
                    waiting += [replace(branch, lengths=(length, length)) for length in lengths]
                else:
                    best = min(best, branch.bound)
        return int(best)

    def _with_bytes(self, branches: Sequence[Branch]) -> Iterator[Branch]:
        """With the fullest worker's least bytes in place of seconds, as if the first stage had no more than
        the fewest of its layers."""
        for some in grouped(branches, _form).values():
            asked = [(each.combination, each.lengths[0]) for each in some]
            least = self._least_apart(self._tables_of(some[0].combination).least_bytes(asked), some)
            yield from (replace(each, bound=bytes_) for each, bytes_ in zip(some, least, strict=True))

    def _bounds(self, combinations: Sequence[Combination]) -> Iterator[tuple[Bounds, list[Combination]]]:
        """Of those of each form."""
        for some in grouped(combinations, lambda each: form_of(each.strategy)).values():
            yield self._bounds_of(some[0]), some

    def _bounds_of(self, combination: Combination) -> Bounds:
        problem = self._problem.of(combination)
        if problem.form not in self._of_form:
            self._of_form[problem.form] = bounds_of(problem, self._limit, self._recompute)
        return self._of_form[problem.form]

    def branches(self, combinations: Sequence[Combination], enough: float = NEVER) -> list[Branch]:
        """All cuts of each combination as one branch; of those that cannot fit, or take less than ``enough``
        seconds, none."""
        whole = [Branch(0.0, each, self._lengths(each), limited=False) for each in combinations]
        found = []
        for (_, _, by_first), some in grouped(whole, self._bounded_together).items():
            if by_first:
                for branch, parts in zip(some, self._divided(some, enough), strict=True):
                    self._parts[branch.combination] = parts
                    found += [replace(branch, bound=min(part.bound for part in parts))] if parts else []
            else:
                found += self._bounded(some)
        return found

    def _bounded_together(self, branch: Branch) -> tuple[Form, bool, bool]:
        """(form, whether it splits backwards, whether it is looked at by its first stage)."""
        splits = FORMULAS[branch.combination.strategy.schedule].splits
        return _form(branch), splits, self._limit is not None and self._by_first_stage(branch)

    def settle(self, branch: Branch) -> Sequence[Choice | Cut | Branch]:
        """The best of a branch that is not to be divided, or what it has been divided into; nothing where
        nothing of it fits the memory."""
        combination = branch.combination
        if not branch.limited and self._may_be_plenty(branch):
            found = self._cut(combination, branch.lengths, limited=False)
            assert found is not None, "a combination has no more stages than there are layers"
            recompute = self._recompute or ()
            cost = evaluate(self._problem, combination, found.bounds, recompute)
            if self._limit is None or cost.memory_bytes <= self._limit:
                return [Choice(combination, found.bounds, recompute, cost)]
        if self._by_first_stage(branch):
            return self._parts.pop(combination)
        cut = self._cut(combination, branch.lengths, limited=True)
        return [] if cut is None else [cut]

    def is_whole(self, branch: Branch) -> bool:
        """Whether it is one of ``branches`` that has been divided already."""
        return not branch.limited and self._limit is not None and self._by_first_stage(branch)

    def prepare(self, branches: Sequence[Branch]) -> None:
        """Works out at once what each of what has been ``divided`` is settled with."""
        for some in grouped((each for each in branches if each.limited), _form).values():
            asked = [(each.combination, each.lengths[0]) for each in some]
            self._tables_of(some[0].combination).prepare(asked)

    def divides(self, branch: Branch) -> bool:
        """Whether it must be ``divided`` before it can be settled."""
        return branch.limited and self._by_first_stage(branch)

    def divided(self, branches: Sequence[Branch], enough: float) -> list[Branch]:
        """Smaller branches in place of each, none of what cannot fit, or take less than ``enough``."""
        of_form = grouped(branches, _form).values()
        return [part for some in of_form for parts in self._divided(some, enough) for part in parts]

    def by_first_stage(self, combination: Combination) -> bool:
        """Whether its cuts are looked at by the length of the first stage: what all others keep may depend on
        it."""
        whole = Branch(0.0, combination, self._lengths(combination), limited=False)
        return self._limit is not None and self._by_first_stage(whole)

    def price(self, cut: Cut) -> Choice:
        """The best choice with this cut, which fits."""
        combination, bounds = cut.combination, cut.bounds
        recompute = self._tables_of(combination).recomputed(combination, bounds)
        assert recompute is not None, "what the tables take for fitting can be made to fit"
        cost = evaluate(self._problem, combination, bounds, recompute)
        assert self._limit is not None and cost.memory_bytes <= self._limit, "what was made to fit fits"
        return Choice(combination, bounds, recompute, cost)

    def _lengths(self, combination: Combination) -> tuple[int, int]:
        longest = self._problem.layers - combination.stages + 1
        return (1, longest) if combination.stages > 1 else (longest, longest)

    def _may_be_plenty(self, branch: Branch) -> bool:
        """Whether the best with memory in plenty may be it: not if anything that is no better takes less than
        is possible within the memory."""
        combination, stages = branch.combination, branch.combination.stages
        if self._limit is None:
            return True
        evenly = tuple(k * self._problem.layers // stages for k in range(stages + 1))
        seconds = step_seconds(self._problem, combination, evenly, self._recompute or ())
        return branch.bound * (1 - max(self._tolerance, ALIKE)) <= seconds

    @staticmethod
    def _by_first_stage(branch: Branch) -> bool:
        """Whether what its stages may keep depends on a choice of the first stage's length."""
        least, most = branch.lengths
        return least < most and FORMULAS[branch.combination.strategy.schedule].by_first_stage

    def _divided(self, branches: Sequence[Branch], enough: float) -> list[list[Branch]]:
        """Each by lengths of the first stage, without those that cannot fit, or take less than ``enough``; in
        one form."""
        of_form = self._bounds_of(branches[0].combination)
        lengths = []
        for branch in branches:
            least, most = of_form.windows.first_lengths(branch.combination, enough)
            lengths.append(_ranges(max(branch.lengths[0], least), min(branch.lengths[1], most)))
        asked = [
            (branch.combination, each)
            for branch, some in zip(branches, lengths, strict=True)
            for each in some
        ]
        bounds = iter(of_form.least(asked, enough))
        divided = []
        for branch, some in zip(branches, lengths, strict=True):
            parts = [replace(branch, bound=next(bounds), lengths=each, limited=True) for each in some]
            divided.append([part for part in parts if part.bound < NEVER])
        return divided

    def _bounded(self, branches: Sequence[Branch]) -> list[Branch]:
        """Those that fit, with what none of their cuts takes less than; in one form, all of which split
        backwards or none."""
        asked = [(each.combination, each.lengths[0]) for each in branches]
        tables = self._tables_of(branches[0].combination)
        least = self._least_apart(tables.of_many(asked, limited=self._limit is not None), branches)
        bounded = zip(branches, least, strict=True)
        return [replace(each, bound=bound) for each, bound in bounded if bound < NEVER]

    @staticmethod
    def _least_apart(many: ManyTables, branches: Sequence[Branch]) -> list[float]:
        rows = [row * each.combination.strategy.chunks for row, each in zip(many.rows, branches, strict=True)]
        ends = [each.lengths for each in branches]
        least: list[float] = least_apart(many.added_NFS, many.beyond_NFS, rows, ends).tolist()
        return least

    def _cut(self, combination: Combination, lengths: tuple[int, int], *, limited: bool) -> Cut | None:
        """Where the layers are cut best; None where no cut fits."""
        added, beyond = zip(*self._stages(combination, lengths, limited=limited), strict=True)
        found = least_sum_and_maximum(added, beyond, self._tolerance)
        if found is None:
            return None
        inner = found[1][:-1]
        bounds = (lengths[0] + inner[0], *(place + 1 for place in inner[1:])) if inner else ()
        return Cut(found[0], combination, (0, *bounds, self._problem.layers))

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


def _form(branch: Branch) -> Form:
    return form_of(branch.combination.strategy)


def _ranges(least: int, most: int) -> list[tuple[int, int]]:
    """``PARTS`` ranges, or as many as there are lengths, as long as each other by ratio: what stages after a
    first one keep goes by that. None where there is no length."""
    starts = [*range(least, most + 1)]
    if not starts:
        return []
    if len(starts) > PARTS:
        starts = sorted({round(least * (most / least) ** (part / PARTS)) for part in range(PARTS)})
    return [(start, stop - 1) for start, stop in pairwise([*starts, most + 1])]
