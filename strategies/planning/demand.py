"""How many workers a job has a use for, by prediction."""

from __future__ import annotations

from typing import Literal

from runtime.layout import Layout
from runtime.plan import Member
from strategies.planning.costs import CostModel
from strategies.planning.partition import MOST_STAGES
from strategies.planning.planner import choose_plan

ALIKE = 0.05
"""Relative: a step that is predicted to take so little less is no reason to ask for further machines. Above
what ``ranking.UNSTEADINESS`` makes of plans that are equally good."""


def useful_workers(
    layout: Layout,
    costs: CostModel,
    micro_batches: int,
    stages: int | Literal["auto"],
    least: int,
    most: int,
) -> int:
    """The fewest of ``least`` to ``most`` usual workers, each in a failure domain of its own, whose step is
    predicted to be as short as that of any more, up to ``ALIKE``.

    Micro-batches are whole, so that seconds over workers is a staircase: with 12 micro-batches in one stage
    five workers are as slow as four. Looks at about 2 log2(most) plans: by doubling for the shortest step,
    then by bisection for the first stair that reaches it. Pure.
    """
    assert 1 <= least <= most
    deepest = min(MOST_STAGES if stages == "auto" else stages, layout.layers)
    most = max(least, min(most, micro_batches * deepest))  # beyond it, some would have nothing to compute
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))

    def seconds(workers: int) -> float:
        members = [Member(worker, str(worker)) for worker in range(workers)]
        return choose_plan(0, members, layout, costs, micro_batches, stages)[1].step_seconds

    tried = [seconds(size) for size in sizes]
    enough = min(tried) * (1 + ALIKE)
    first = next(place for place, each in enumerate(tried) if each <= enough)
    if first == 0:
        return least
    too_few, found = sizes[first - 1], sizes[first]
    while found - too_few > 1:
        middle = (too_few + found) // 2
        if seconds(middle) <= enough:
            found = middle
        else:
            too_few = middle
    return found
