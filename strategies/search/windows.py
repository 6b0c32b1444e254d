"""How many layers a group's stages can have in a cut that does not take too long: few, where there are many
stages."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from strategies.search.cost import Problem
from strategies.search.families import Values
from strategies.search.formulas import FORMULAS
from strategies.search.shortest import NEVER
from strategies.search.space import Combination

CLOSE = 1e-9
"""Relative: seconds that differ by less may be the same ones, rounded otherwise."""

Window = tuple[list[int], list[int]]
"""The fewest and the most layers that count in a stage of each group."""


class Windows:
    """Of one problem, in one form. ``counted_before``: how many of the layers before each count, and of all.
    ``seconds_of``: whether backward is taken in two parts -> (seconds of a micro-batch in all layers, the
    least in so many that count, from 1)."""

    def __init__(
        self, problem: Problem, counted_before: Values, seconds_of: Callable[[bool], tuple[float, Values]]
    ) -> None:
        self._problem, self._counted_before, self._seconds_of = problem, counted_before, seconds_of
        self._counted = int(counted_before[-1])
        self._known: dict[object, Window | None] = {}

    def of(self, combination: Combination, enough: float) -> Window | None:
        """In any cut that takes less than ``enough`` seconds; None if there is none."""
        strategy, sizes = combination.strategy, combination.sizes
        chunks, total = strategy.chunks, self._counted
        if enough == NEVER:
            return [total if len(sizes) * chunks == 1 else 0] * len(sizes), [total] * len(sizes)
        key = FORMULAS[strategy.schedule].splits, chunks, sizes, enough
        if key not in self._known:
            of_size = {size: self._most(combination, size, enough) for size in {*sizes}}
            most = [of_size[size] for size in sizes]
            spare = chunks * sum(most) - total
            # what the others have no room for
            fewest = [max(each - spare, 0) if chunks == 1 else 0 for each in most]
            self._known[key] = (fewest, most) if spare >= 0 else None
        return self._known[key]

    def first_lengths(self, combination: Combination, enough: float) -> tuple[int, int]:
        """Of the first stage, all layers: (from, to). There may be none."""
        longest = self._problem.layers - combination.stages + 1
        shortest = 1 if combination.stages > 1 else longest
        window = self.of(combination, enough)
        if window is None:
            return 1, 0
        if combination.strategy.chunks > 1:
            return shortest, longest
        (fewest, *_), (most, *_) = window
        least = int(self._counted_before.searchsorted(fewest))
        greatest = int(self._counted_before.searchsorted(most, "right")) - 1
        return max(shortest, least), min(longest, greatest)

    def _most(self, combination: Combination, size: int, enough: float) -> int:
        """A stage's micro-batches take less than ``enough`` beside what all stages add."""
        chunks, splits = combination.strategy.chunks, FORMULAS[combination.strategy.schedule].splits
        total, seconds_L = self._seconds_of(splits)
        filling = 0.0 if splits else total / chunks
        rounds = chunks * self._problem.rounds(combination, size) - (chunks - 1 if splits else 1)
        if not rounds:
            return self._counted
        return bisect_left(seconds_L, (enough * (1 + CLOSE) - filling) / rounds)
