"""The plan under which an interrupted step is finished: the old one without those who are lost.

Same cut, and everybody keeps its place and its micro-batches, so that what survivors have summed stays
theirs; only where a stage has nobody left others come to it. The division that suits the new number of
workers follows at the next step boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from runtime.layout import Layout
from runtime.plan import Member, Plan, Stage, WorkerId
from runtime.salvage import Salvage, Status, WorkerProgress, remaining, salvage
from strategies.sharding import shard_blocks


def mended(
    generation: int,
    members: Sequence[Member],
    layout: Layout,
    previous: Plan,
    step: int,
    progress: Mapping[WorkerId, WorkerProgress],
    layer_seconds: Sequence[float],
) -> tuple[Plan, Salvage] | None:
    """``previous`` among ``members``, and what of the interrupted ``step`` it keeps.

    Members without work take the places of the lost, in stages that have nobody left first. The micro-batches
    of the lost go to whoever of the stage has the least to do. A stage that has nobody left even so gets
    workers of others, whose part is then done by the rest of their own stage: as many as finish the step
    soonest (``layer_seconds`` as in ``finishing_seconds``). None where no stage can spare any, and where
    teams have computed: what members have of a micro-batch are slices, which other teams would cut otherwise.
    """
    if previous.teams:
        return None
    speed = {member.worker: member.speed for member in members}
    by_members = {stage.workers: [w for w in stage.workers if w in speed] for stage in previous.stages}
    groups = list(by_members.values())
    reserve = sorted(set(speed) - set(previous.workers))
    lost = [len(workers) - len(group) for workers, group in by_members.items()]
    while reserve and any(lost):
        k = max(range(len(groups)), key=lambda k: (not groups[k], lost[k]))
        groups[k].append(reserve.pop(0))
        lost[k] -= 1
    empty = [k for k, group in enumerate(groups) if not group]
    found: list[tuple[Plan, Salvage]] = []
    for each in range(1, max(lost[k] for k in empty) + 1) if empty else (0,):
        staffed = _lent(groups, empty, each, progress)
        if staffed is None:
            break
        by_stage = dict(zip(by_members, staffed, strict=True))
        stages = tuple(
            Stage(stage.first, stage.stop, tuple(sorted(by_stage[stage.workers])))
            for stage in previous.stages
        )
        assignment = tuple(
            _dealt_again(previous, k, row, stage.workers, speed, progress)
            for k, (row, stage) in enumerate(zip(previous.assignment, stages, strict=True))
        )
        plan = replace(previous, generation=generation, stages=stages, assignment=assignment)
        found.append((plan, salvage(plan, step, progress)))
    if not found:
        return None
    plan, kept = min(found, key=lambda one: finishing_seconds(one[0], one[1], members, layer_seconds))
    staying = set(plan.workers)
    at_work = [member for member in members if member.worker in staying]
    return replace(plan, shards=shard_blocks(layout, plan.stages, at_work)), kept


def _lent(
    groups: Sequence[Sequence[WorkerId]],
    empty: Sequence[int],
    each: int,
    progress: Mapping[WorkerId, WorkerProgress],
) -> list[list[WorkerId]] | None:
    """``groups`` with ``each`` workers of others in every empty one: of the largest, and there of whom the
    least is lost by it. None where that leaves another group empty."""

    def done(worker: WorkerId) -> int:
        known = progress.get(worker)
        return 0 if known is None else sum(status is Status.DONE for status in known.statuses.values())

    staffed = [list(group) for group in groups]
    for k in [k for _ in range(each) for k in empty]:
        largest = max(
            (j for j in range(len(groups)) if j not in empty), key=lambda j: len(staffed[j]), default=k
        )
        if len(staffed[largest]) < 2:
            return None
        lent = min(staffed[largest], key=lambda worker: (done(worker), worker))
        staffed[largest].remove(lent)
        staffed[k].append(lent)
    return staffed


def _dealt_again(
    plan: Plan,
    stage: int,
    row: Sequence[WorkerId],
    group: Sequence[WorkerId],
    speed: Mapping[WorkerId, float],
    progress: Mapping[WorkerId, WorkerProgress],
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


def finishing_seconds(
    plan: Plan, found: Salvage, members: Sequence[Member], layer_seconds: Sequence[float]
) -> float:
    """How long whoever has the most left of the step computes. ``layer_seconds``: forward and backward of one
    micro-batch, per layer, at speed 1."""
    speed = {member.worker: member.speed for member in members}
    return max(
        sum(n * sum(layer_seconds[plan.stages[k].first : plan.stages[k].stop]) for k, n in stages.items())
        / speed[worker]
        for worker, stages in remaining(plan, found).items()
    )


def pays(plan: Plan, found: Salvage, members: Sequence[Member], layer_seconds: Sequence[float]) -> bool:
    """Whether finishing the step takes less than doing it again divided as well as can be (``layer_seconds``
    as in ``finishing_seconds``)."""
    again = sum(
        sum(layer_seconds[stage.first : stage.stop])
        for k, stage in enumerate(plan.stages)
        for micro_batch in range(plan.micro_batches)
        if plan.passes(micro_batch, k)
    )
    together = sum(member.speed for member in members)
    return finishing_seconds(plan, found, members, layer_seconds) < again / together
