"""The plan that textbooks draw: one worker a stage group, layers cut evenly, every group as many stages."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.plan import Plan, Stage


def even_plan(groups: int, micro_batches: int, chunks: int = 1) -> Plan:
    """Worker w holds stages w, w + groups, w + 2 x groups, ... of ``groups`` x ``chunks``, each one layer.

    Nobody owns anything: a plan to simulate. Raises ValueError for counts below 1.
    """
    if min(groups, micro_batches, chunks) < 1:
        raise ValueError("stages, micro-batches and chunks must be at least 1")
    stages = tuple(Stage(k, k + 1, (k % groups,)) for k in range(groups * chunks))
    return Plan(0, stages, tuple(stage.workers * micro_batches for stage in stages), ())


def even_path_plan(stages: int, paths: Sequence[tuple[int, ...]]) -> Plan:
    """Worker k of ``stages`` holds stage k, one layer, and the last one the end of the model too: a stage
    without a layer, to which ``paths`` (one a micro-batch, without it) lead. A plan to simulate, as above."""
    held = tuple(Stage(k, k + 1, (k,)) for k in range(stages))
    held = (*held, Stage(stages, stages, (stages - 1,)))
    rows = tuple(stage.workers * len(paths) for stage in held)
    return Plan(0, held, rows, (), paths=tuple((*path, stages) for path in paths))
