"""Plans whose micro-batches skip stages: the planner divides whole stages among groups of workers.

Stages are the recipe's (``strategies.skippipe.paths``), and so is what each computes; only who holds them is
planned. To the planner a stage is a layer that takes its seconds times the share of micro-batches that pass
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

from runtime.layout import Layout
from runtime.plan import Member, Plan, Stage, WorkerId
from strategies.planning.costs import CostModel
from strategies.planning.planner import choose_plan
from strategies.sharding import shard_blocks
from strategies.skippipe.paths import Paths


def choose_path_plan(
    generation: int,
    members: Sequence[Member],
    layout: Layout,
    costs: CostModel,
    micro_batches: int,
    stages: int | Literal["auto"],
    previous: Plan | None,
    paths: Paths,
) -> Plan:
    """As ``choose_plan``, with ``stages`` the number of groups; every group holds a run of the paths' stages,
    each a stage of the plan. A worker computes a micro-batch at all of its group's stages."""
    assert layout.layers == paths.bounds[-1], "paths of another model"
    by_stage = staged_costs(costs, paths)
    before = None if previous is None else grouped(previous)
    chosen, _ = choose_plan(
        generation, members, staged_layout(layout, paths), by_stage, micro_batches, stages, before
    )
    speed = {member.worker: member.speed for member in members}
    seconds = [f + b for f, b in zip(*_seconds(costs, paths), strict=True)]
    held, rows = [], []
    for group in chosen.stages:
        mine = range(group.first, group.stop)
        work = [sum(seconds[k] for k in mine if k in path) for path in paths.of]
        row = _dealt(work, [(worker, speed[worker]) for worker in group.workers])
        held += [Stage(paths.bounds[k], paths.bounds[k + 1], group.workers) for k in mine]
        rows += [row] * len(mine)
    at_work = [member for member in members if member.worker in chosen.workers]
    shards = shard_blocks(layout, held, at_work)
    return Plan(generation, tuple(held), tuple(rows), shards, paths=paths.of)


def grouped(plan: Plan) -> Plan:
    """``plan`` as the planner knows it: one stage a group, whose layers are the stages that it holds."""
    counts = [sum(stage.workers == group for stage in plan.stages) for group in plan.groups]
    stops = tuple(accumulate(counts))
    stages = tuple(Stage(stop - n, stop, g) for n, stop, g in zip(counts, stops, plan.groups, strict=True))
    rows = tuple(plan.assignment[stop - 1] for stop in stops)
    return replace(plan, stages=stages, assignment=rows, paths=())


def staged_layout(layout: Layout, paths: Paths) -> Layout:
    """``layout`` with the paths' stages for layers."""
    stage_of = [k for k in paths.full for _ in range(paths.bounds[k], paths.bounds[k + 1])]
    blocks = tuple(
        replace(block, layers=tuple(sorted({stage_of[layer] for layer in block.layers})))
        for block in layout.blocks
    )
    return Layout(paths.stages, blocks, ())


def staged_costs(costs: CostModel, paths: Paths) -> CostModel:
    """``costs`` of a usual micro-batch with the paths' stages for layers."""
    shares = [paths.share(k) for k in paths.full]
    forward, backward = _seconds(costs, paths)
    ends = [stop - 1 for stop in paths.bounds[1:]]
    bounds = costs.boundary_bytes
    return replace(
        costs,
        forward_seconds=tuple(s * share for s, share in zip(forward, shares, strict=True)),
        backward_seconds=tuple(s * share for s, share in zip(backward, shares, strict=True)),
        parameter_bytes=tuple(map(int, _summed(costs.parameter_bytes, paths))),
        boundary_bytes=tuple(int(bounds[end] * s) for end, s in zip(ends, shares, strict=True))
        if bounds
        else (),
    )


def _seconds(costs: CostModel, paths: Paths) -> tuple[list[float], list[float]]:
    return _summed(costs.forward_seconds, paths), _summed(costs.backward_seconds, paths)


def _summed(values: Sequence[float], paths: Paths) -> list[float]:
    return [sum(values[layer] for layer in paths.layers_of((k,))) for k in paths.full]


def _dealt(work: Sequence[float], speeds: Sequence[tuple[WorkerId, float]]) -> tuple[WorkerId, ...]:
    """Each micro-batch in turn to whoever is done with it first, having done all it got before."""
    load = {worker: 0.0 for worker, _ in speeds}
    speed, row = dict(speeds), []
    for seconds in work:
        taker = min(load, key=lambda worker: ((load[worker] + seconds) / speed[worker], worker))
        load[taker] += seconds
        row.append(taker)
    return tuple(row)
