"""The plan that textbooks draw: one worker a stage group, layers cut evenly, every group as many stages."""

from __future__ import annotations

from runtime.plan import Plan, Stage


def even_plan(groups: int, micro_batches: int, chunks: int = 1) -> Plan:
    """Worker w holds stages w, w + groups, w + 2 x groups, ... of ``groups`` x ``chunks``, each one layer.

    Nobody owns anything: a plan to simulate. Raises ValueError for counts below 1.
    """
    if min(groups, micro_batches, chunks) < 1:
        raise ValueError("stages, micro-batches and chunks must be at least 1")
    stages = tuple(Stage(k, k + 1, (k % groups,)) for k in range(groups * chunks))
    return Plan(0, stages, tuple(stage.workers * micro_batches for stage in stages), ())
