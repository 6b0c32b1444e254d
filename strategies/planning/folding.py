"""Plans whose stage groups hold several stages each, from plans with one stage a group and back.

The planner divides layers among groups as if every group's were a run of their own; which of them a group
holds is settled afterwards, round the groups as often as there are chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from runtime.layout import Layout
from runtime.plan import Member, Plan, Stage
from strategies.planning.partition import cut_for_groups, group_rounds
from strategies.sharding import shard_blocks


def unfolded(
    plan: Plan, chunks: int, layout: Layout, members: Sequence[Member], layer_seconds: Sequence[float]
) -> Plan:
    """``plan`` with every group's work in ``chunks`` stages (or as many as there are layers for), the groups
    in turn; ``layer_seconds`` are forward and backward of a micro-batch. Pure: the same groups
    and seconds get the same layers again."""
    groups = len(plan.stages)
    chunks = min(chunks, layout.layers // groups)
    if chunks < 2:
        return plan
    speed = {member.worker: member.speed for member in members}
    rounds = [group_rounds([speed[w] for w in stage.workers], plan.micro_batches) for stage in plan.stages]
    bounds = cut_for_groups(layer_seconds, rounds * chunks)
    stages = tuple(
        Stage(first, stop, plan.stages[k % groups].workers)
        for k, (first, stop) in enumerate(pairwise(bounds))
    )
    at_work = set(plan.workers)
    shards = shard_blocks(layout, stages, [member for member in members if member.worker in at_work])
    return replace(plan, stages=stages, assignment=plan.assignment * chunks, shards=shards)


def folded(plan: Plan) -> Plan:
    """``plan`` as the planner knows it: one stage a group, with as many layers as the group holds."""
    groups = plan.groups
    if len(groups) == len(plan.stages):
        return plan
    layers = [sum(stage.stop - stage.first for stage in plan.stages if stage.workers == g) for g in groups]
    stops = accumulate(layers)
    stages = tuple(Stage(stop - n, stop, g) for n, stop, g in zip(layers, stops, groups, strict=True))
    return replace(plan, stages=stages, assignment=plan.assignment[: len(groups)])
