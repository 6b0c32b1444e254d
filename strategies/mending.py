"""The plan under which an interrupted step is finished: the old one without those who are lost.

Same cut, same groups, and everybody keeps its micro-batches, so that what survivors have summed stays
theirs. The division that suits the new number of workers follows at the next step boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from runtime.layout import Layout
from runtime.plan import Member, Plan, Stage, WorkerId
from runtime.salvage import Progress, Salvage, Status, remaining, salvage
from strategies.sharding import shard_blocks


def mended(
    generation: int,
    members: Sequence[Member],
    layout: Layout,
    previous: Plan,
    step: int,
    progress: Mapping[WorkerId, Progress],
) -> tuple[Plan, Salvage] | None:
    """``previous`` among ``members``, and what of the interrupted ``step`` it keeps.

    Members without work take the places of the lost, in stages that have nobody left first. The micro-batches
    of the lost go to whoever of the stage has the least to do. None where a stage has nobody left.
    """
    speed = {member.worker: member.speed for member in members}
    by_members = {stage.workers: [w for w in stage.workers if w in speed] for stage in previous.stages}
    groups = list(by_members.values())
    reserve = sorted(set(speed) - set(previous.workers))
    lost = [len(workers) - len(group) for workers, group in by_members.items()]
    while reserve and any(lost):
        k = max(range(len(groups)), key=lambda k: (not groups[k], lost[k]))
        groups[k].append(reserve.pop(0))
        lost[k] -= 1
    if not all(groups):
        return None
    stages = tuple(
        Stage(stage.first, stage.stop, tuple(sorted(by_members[stage.workers]))) for stage in previous.stages
    )
    assignment = tuple(
        _dealt_again(previous, k, row, stage.workers, speed, progress)
        for k, (row, stage) in enumerate(zip(previous.assignment, stages, strict=True))
    )
    at_work = [member for member in members if any(member.worker in stage.workers for stage in stages)]
    shards = shard_blocks(layout, stages, at_work)
    plan = replace(previous, generation=generation, stages=stages, assignment=assignment, shards=shards)
    return plan, salvage(plan, step, progress)


def _dealt_again(
    plan: Plan,
    stage: int,
    row: Sequence[WorkerId],
    group: Sequence[WorkerId],
    speed: Mapping[WorkerId, float],
    progress: Mapping[WorkerId, Progress],
) -> tuple[WorkerId, ...]:
    left = dict.fromkeys(group, 0)
    for micro_batch, worker in enumerate(row):
        if worker in left and plan.passes(micro_batch, stage):
            known = progress.get(worker)
            left[worker] += known is None or known.statuses.get((stage, micro_batch)) is not Status.DONE
    dealt = list(row)
    for micro_batch, worker in enumerate(row):
        if worker not in left:
            taker = min(group, key=lambda w: ((left[w] + 1) / speed[w], w))
            left[taker] += plan.passes(micro_batch, stage)
            dealt[micro_batch] = taker
    return tuple(dealt)


def pays(plan: Plan, found: Salvage, members: Sequence[Member], layer_seconds: Sequence[float]) -> bool:
    """Whether finishing the step takes less than doing it again divided as well as can be.

    ``layer_seconds``: forward and backward of one micro-batch, per layer, at speed 1.
    """
    speed = {member.worker: member.speed for member in members}
    left = remaining(plan, found)
    finish = max(
        sum(n * sum(layer_seconds[plan.stages[k].first : plan.stages[k].stop]) for k, n in stages.items())
        / speed[worker]
        for worker, stages in left.items()
    )
    again = sum(
        sum(layer_seconds[stage.first : stage.stop])
        for k, stage in enumerate(plan.stages)
        for micro_batch in range(plan.micro_batches)
        if plan.passes(micro_batch, k)
    )
    return finish < again / sum(speed.values())
