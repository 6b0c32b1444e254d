"""The best choices of many combinations, looking at as few of their cuts as can be: best first.

What is cheap to say comes first: a bound for each combination, then one that knows the cuts, for ever more at
a time, then the step itself; each is no less than the one before, so the first that is known in full is the
best of all. What cannot be better than the best of what is known so far is left out of what is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from itertools import count as counting

from strategies.search.dynamic import Branch, Choice, Cut, CutSearch
from strategies.search.shortest import ALIKE, NEVER
from strategies.search.space import Combination

OPENED = 2
"""Of how many combinations at first the cuts are looked at. Then it is twice as many, and so on."""

OPENED_BY_PARTS = 32
"""As ``OPENED``, once there is what must be looked at by the length of the first stage."""

SETTLED, MOST_SETTLED = 8, 32
"""Of how many branches at first and at most tables or parts are worked out at once."""

TOGETHER = 0.1
"""Relative: combinations whose bounds differ by more than this are not looked at at once."""

Known = Branch | Cut | Choice


class BestFirst:
    """The best choices of ``cuts``' combinations: none that takes ``enough`` seconds, and none that is not
    ``near`` the best, relatively. ``place_of``: of those that are as good the first comes first."""

    def __init__(
        self, cuts: CutSearch, place_of: Mapping[Combination, int], enough: float, near: float
    ) -> None:
        self._cuts, self._place_of = cuts, place_of
        self._enough, self._near, self._least_known = enough, near, NEVER
        self._least: dict[Combination, float] = {}
        self._unopened: list[Combination] = []
        self._many, self._many_settled = OPENED, SETTLED
        self._waiting: list[tuple[float, int, int, Known]] = []
        self._numbers = counting()

    def choices(self, some: Sequence[Combination], count: int) -> list[Choice]:
        """No more than ``count`` of ``some`` combinations, the best first."""
        slow = [each for each in some if self._cuts.by_first_stage(each)]
        self._add([each for each in some if not self._cuts.by_first_stage(each)])
        if slow:  # how long the best of the others takes says how long these may take
            best = self._next()
            self._add(slow)
            self._many = max(self._many, OPENED_BY_PARTS)
            self._wait([best] if best else [])
        found: dict[int, Choice] = {}
        while len(found) < count and (choice := self._next(found)) is not None:
            found[self._place_of[choice.combination]] = choice
        return list(found.values())

    def _add(self, some: Sequence[Combination]) -> None:
        for each, bound in zip(some, self._cuts.least(some, self._enough), strict=True):
            if bound < NEVER:
                self._least[each] = bound * (1 - ALIKE)
                self._unopened.append(each)
        self._unopened.sort(key=lambda each: -self._least[each])

    def _next(self, found: Mapping[int, Choice] | None = None) -> Choice | None:
        """The best choice of what is left, but not of those combinations that one has been ``found`` of."""
        while self._waiting or self._unopened:
            waiting = self._waiting[0][0] if self._waiting else NEVER
            nearest = self._least[self._unopened[-1]] if self._unopened else NEVER
            if min(waiting, nearest) >= self._enough:
                break
            if nearest <= waiting:
                self._open(nearest)
                continue
            _, place, _, known = heappop(self._waiting)
            if found and place in found:  # by a better branch
                continue
            if isinstance(known, Choice):
                return known
            if isinstance(known, Cut):
                self._wait([self._cuts.price(known)])
            elif self._cuts.is_whole(known):
                self._wait(self._cuts.settle(known))
            else:
                self._settle(known)
        return None

    def _open(self, nearest: float) -> None:
        opened = [self._unopened.pop()]
        together = min(nearest * (1 + TOGETHER), self._enough)
        while self._unopened and len(opened) < self._many and self._least[self._unopened[-1]] <= together:
            opened.append(self._unopened.pop())
        self._many *= 2
        self._wait(self._cuts.branches(opened, self._enough))

    def _settle(self, branch: Branch) -> None:
        """Others that may be better than what is known are divided with it, or made ready."""
        several, many = [branch], self._many_settled
        while len(several) < many and self._waiting and self._waiting[0][0] < self._least_known:
            other = self._waiting[0][3]
            if not isinstance(other, Branch):
                break
            heappop(self._waiting)
            if self._cuts.is_whole(other):
                self._wait(self._cuts.settle(other))
            else:
                several.append(other)
        self._many_settled = min(2 * many, MOST_SETTLED)
        dividing = [each for each in several if self._cuts.divides(each)]
        ready = [each for each in several if not self._cuts.divides(each)]
        self._cuts.prepare(ready)
        self._wait(self._cuts.divided(dividing, self._enough))
        if ready and ready[0] is branch:
            self._wait(self._cuts.settle(ready.pop(0)))
        self._wait(ready)

    def _wait(self, opened: Sequence[Known]) -> None:
        for each in opened:
            if isinstance(each, Choice):
                seconds = bound = each.cost.step_seconds
            else:  # branches that are alike but for rounding are all settled before one is taken
                seconds, bound = each.bound, each.bound * (1 - ALIKE)
            if not isinstance(each, Branch):
                self._least_known = min(self._least_known, seconds)
                self._enough = min(self._enough, seconds * (1 + self._near) * (1 + ALIKE))
            heappush(self._waiting, (bound, self._place_of[each.combination], next(self._numbers), each))
