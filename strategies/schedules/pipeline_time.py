"""How long a step's pipeline takes under any schedule, for groups of workers of any speeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

from runtime.plan import Plan, Stage, Strategy, WorkerId
from strategies.planning.partition import deal_micro_batches
from strategies.schedules.registry import schedule_named
from strategies.schedules.simulation import StageSeconds, simulate


def pipeline_seconds(
    strategy: Strategy,
    bounds: Sequence[int],
    groups: Sequence[Sequence[float]],
    micro_batches: int,
    seconds: Sequence[StageSeconds],
) -> float:
    """Seconds from the first forward to the last backward, simulated; about 6 us for each task.

    ``groups`` are the speeds of each stage group's workers, ``bounds`` and ``seconds`` (at speed 1.0)
    those of ``strategy.chunks`` x groups stages, held by the groups in turn.
    """
    first = list(accumulate(map(len, groups), initial=0))
    workers = [tuple(range(a, b)) for a, b in pairwise(first)]
    dealt = [
        deal_micro_batches(list(zip(members, speeds, strict=True)), micro_batches)
        for members, speeds in zip(workers, groups, strict=True)
    ]
    stages = tuple(Stage(a, b, workers[k % len(groups)]) for k, (a, b) in enumerate(pairwise(bounds)))
    plan = Plan(0, stages, tuple(dealt[k % len(groups)] for k in range(len(stages))), ())
    speeds = dict(enumerate(speed for group in groups for speed in group))
    return plan_pipeline_seconds(plan, strategy, seconds, speeds)


def plan_pipeline_seconds(
    plan: Plan,
    strategy: Strategy,
    seconds: Sequence[StageSeconds],
    speeds: Mapping[WorkerId, float],
) -> float:
    """``pipeline_seconds`` of a plan as it is dealt."""
    schedule = schedule_named(strategy.schedule, strategy.chunks)
    return simulate(schedule, plan, seconds, speeds).seconds
