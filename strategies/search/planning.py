"""A whole plan by the search: its strategy, then who does what, nearest to what was before.

It runs at the start and at every change of membership, while others wait. Nothing that it may change from one
plan to the next changes the result's bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from runtime.layout import Layout
from runtime.plan import Member, Plan, Stage, Strategy
from strategies.planning.candidates import nearest_groups, spread_over_domains
from strategies.planning.costs import CostModel, Predictor
from strategies.planning.folding import folded, unfolded
from strategies.planning.partition import deal_micro_batches
from strategies.planning.planner import choose_plan
from strategies.schedules.pipeline_time import plan_pipeline_seconds
from strategies.schedules.simulation import StageSeconds
from strategies.search.cost import Problem, evaluate, stage_seconds
from strategies.search.formulas import FORMULAS
from strategies.search.search import (
    LARGEST_SIMULATION,
    NothingFits,
    Present,
    Proposal,
    leanest,
    missing,
    search_within,
)
from strategies.search.space import Combination, Space
from strategies.sequence.teams import Teaming, teamed
from strategies.sharding import shard_blocks

TOLERANCE = 2e-3
"""Relative: how far behind the cost model's best a strategy may be. Layers are timed no better than that."""

SIMULATED = 2
"""How many strategies are simulated, at most, before one is taken."""

LEAN = 0.02
"""Relative: how much more memory than the least a plan may take where nothing fits."""

NEARLY = 0.01
"""Relative: what the cost model puts further behind the best is not simulated."""

KEPT = 0.02
"""Relative: a strategy that is predicted to be so little better does not replace the present one."""


def searched_plan(
    generation: int,
    members: Sequence[Member],
    layout: Layout,
    costs: CostModel,
    micro_batches: int,
    space: Space,
    previous: Plan | None = None,
) -> Plan:
    """The plan of the best strategy of ``space`` for ``members``, within ``costs.worker_memory_bytes``.

    ``costs`` have nothing recomputed. Where nothing fits a first plan, NothingFits is raised; after a change
    training goes on with as little memory as can be. Pure and independent of the order of ``members``.
    """
    members = sorted(members, key=lambda member: member.worker)
    speed = sum(member.speed for member in members) / len(members)
    problem = Problem(costs, micro_batches, speed)
    limit = costs.worker_memory_bytes

    strategy = None if previous is None else previous.strategy
    present = Present(strategy, len(previous.groups), KEPT) if previous is not None and strategy else None

    def best(limit: int | None) -> list[Proposal]:
        return search_within(
            problem,
            space,
            len(members),
            limit,
            simulated=SIMULATED,
            tolerance=TOLERANCE,
            present=present,
            near=NEARLY,
        )

    found = best(limit)
    if not found and previous is None:
        raise NothingFits(missing(problem, space, len(members), limit))
    if not found:
        found = best(int(leanest(problem, space, len(members)) * (1 + LEAN)))
    proposal = _kept(found, present)
    team = proposal.strategy.sequence
    teaming = Teaming(team, costs.slices or team)
    plans = [
        teamed(plan, teaming, members)
        for plan in _plans(generation, members, layout, problem, proposal, previous)
    ]
    if len(plans) == 1:
        return plans[0]
    fitting = [plan for plan in plans if fits(plan, costs)]
    return min(fitting or plans[:1], key=lambda plan: plan_seconds(plan, members, costs))


def cut_for_schedule(
    plan: Plan,
    strategy: Strategy,
    layout: Layout,
    members: Sequence[Member],
    costs: CostModel,
    previous: Plan | None,
) -> Plan:
    """``plan``, which is cut as if for 1F1B, or one of as many groups that the search cuts for ``strategy``,
    where it is predicted to be faster under that by more than ``KEPT``. A step of more than
    ``LARGEST_SIMULATION`` tasks, in which a layer more or less counts for little, is left as it is."""
    large = 2 * len(plan.stages) * plan.micro_batches > LARGEST_SIMULATION
    chunks = len(plan.stages) // len(plan.groups)  # fewer than asked for where layers are few
    if large or strategy.schedule not in FORMULAS or (chunks == 1 and strategy.chunks > 1):
        return plan
    space = Space(
        stages=(len(plan.groups),),
        schedules=(strategy.schedule,),
        chunks=chunks,
        shardings=(strategy.sharding,),
        recompute=(),
    )
    searched = searched_plan(plan.generation, members, layout, costs, plan.micro_batches, space, previous)
    here, there = (
        plan_seconds(replace(each, strategy=strategy), members, costs) for each in (plan, searched)
    )
    return replace(searched, strategy=None) if there * (1 + KEPT) < here else plan


def fits(plan: Plan, costs: CostModel) -> bool:
    """Whether the fullest worker has room for its part of ``plan``."""
    return costs.worker_memory_bytes is None or memory_bytes(plan, costs) <= costs.worker_memory_bytes


def memory_bytes(plan: Plan, costs: CostModel) -> int:
    """What the fullest worker has in memory, by the cost model."""
    assert plan.strategy is not None, "a plan of the search has a strategy"
    busiest = max(max(Counter(row).values()) * len(set(row)) for row in plan.assignment)
    problem = Problem(costs, max(busiest, plan.micro_batches))
    combination = Combination(plan.strategy, tuple(map(len, plan.groups)))
    bounds = (0, *(stage.stop for stage in plan.stages))
    return evaluate(problem, combination, bounds, plan.strategy.recompute).memory_bytes


def plan_seconds(plan: Plan, members: Sequence[Member], costs: CostModel) -> float:
    """A step's pipeline as ``plan`` deals it, under its own strategy, with the members' speeds."""
    assert plan.strategy is not None, "a plan of the search has a strategy"
    problem = Problem(costs, plan.micro_batches)
    speed = {member.worker: member.speed for member in members}
    speeds = {worker: speed.get(worker, 1.0) for worker in plan.workers}
    speeds |= {team[0]: min(speeds[worker] for worker in team) for team in plan.teams}
    return plan_pipeline_seconds(plan, plan.strategy, _stage_seconds(problem, plan), speeds)


def _stage_seconds(problem: Problem, plan: Plan) -> list[StageSeconds]:
    assert plan.strategy is not None
    combination = Combination(plan.strategy, ())
    problem = problem.of(combination)
    seconds = []
    for stage in plan.stages:
        forward, inputs, weights = stage_seconds(problem, combination, stage.first, stage.stop)
        again = [layer for layer in plan.strategy.recompute if stage.first <= layer < stage.stop]
        extra = sum(problem.again[layer] for layer in again)
        seconds.append(StageSeconds(forward, inputs + extra, weights))
    return seconds


def _kept(found: Sequence[Proposal], present: Present | None) -> Proposal:
    """The best one, or one like the present that is nearly as good: whose layers are where they were."""
    for each in found:
        near = each.step_seconds <= found[0].step_seconds * (1 + KEPT)
        if present is not None and near and present.is_like(each.strategy, len(each.sizes)):
            return each
    return found[0]


def _plans(
    generation: int,
    members: Sequence[Member],
    layout: Layout,
    problem: Problem,
    proposal: Proposal,
    previous: Plan | None,
) -> Iterator[Plan]:
    """The proposal's own cut and group sizes; where workers are unequal, also what ``choose_plan`` makes of
    its number of stages, which knows no teams."""
    strategy, costs, micro_batches = proposal.strategy, problem.costs, problem.micro_batches
    before = None if previous is None else folded(previous)
    predictor = Predictor(costs, members, micro_batches, before)
    spread = spread_over_domains(members)
    count = len(proposal.sizes)
    ends = (
        *proposal.bounds[1:count],
        layout.layers,
    )  # where a group's layers are, as far as one range can say
    whole = (0, *ends) if strategy.chunks == 1 else _evenly(layout.layers, count)
    groups = nearest_groups(predictor, before, whole, proposal.sizes, spread)
    stages = tuple(
        Stage(first, stop, groups[k % count]) for k, (first, stop) in enumerate(pairwise(proposal.bounds))
    )
    speed = {member.worker: member.speed for member in members}
    rows = [deal_micro_batches([(w, speed[w]) for w in group], micro_batches) for group in groups]
    shards = shard_blocks(layout, stages, members)
    assignment = tuple(rows[k % count] for k in range(len(stages)))
    yield Plan(generation, stages, assignment, shards, strategy=strategy)
    if predictor.alike(spread) or strategy.sequence > 1:
        return
    again = frozenset(strategy.recompute)
    backward = tuple(
        b + (f if layer in again else 0.0)
        for layer, (f, b) in enumerate(zip(costs.forward_seconds, costs.backward_seconds, strict=True))
    )
    dealt = replace(costs, backward_seconds=backward, worker_memory_bytes=None)
    plan, _ = choose_plan(generation, members, layout, dealt, micro_batches, count, before)
    seconds = [f + b for f, b in zip(costs.forward_seconds, backward, strict=True)]
    plan = unfolded(plan, strategy.chunks, layout, members, seconds)
    if strategy.chunks == 1 or len(plan.stages) > len(plan.groups):
        yield replace(plan, strategy=strategy)


def _evenly(layers: int, count: int) -> tuple[int, ...]:
    return tuple(k * layers // count for k in range(count + 1))
