"""The planner as the controller calls it, fed with what the workers measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from runtime.layout import Layout
from runtime.plan import Keeping, Member, Plan, Strategy, WorkerId
from runtime.salvage import Salvage, WorkerProgress
from runtime.signals import PlanChooser, PlanGain, PlanMender
from runtime.speeds import Speeds
from strategies.engine import engine_plan_chooser
from strategies.job import Job
from strategies.planning.costs import BYTES_PER_PARAMETER, CostModel, levelled
from strategies.planning.demand import useful_workers
from strategies.planning.folding import folded, unfolded
from strategies.planning.mending import mended, pays
from strategies.planning.planner import choose_plan
from strategies.planning.step_time import simulate_step
from strategies.profile import Profile
from strategies.schedules.registry import DEFAULT
from strategies.search.planning import cut_for_schedule, fits, plan_seconds, searched_plan
from strategies.search.search import NothingFits
from strategies.search.space import Space
from strategies.sequence.teams import ALONE, Teaming, speeds_of_teams, teamed
from strategies.shardings.registry import SHARDINGS
from strategies.skippipe.paths import Paths
from strategies.skippipe.planning import choose_path_plan, grouped, staged_costs, staged_layout

ONE_F_ONE_B = Strategy(DEFAULT)
"""What the planner divides work for by itself."""


def planners(
    job: Job, layout: Layout, profile: Profile, stages: int | Literal["auto"], *, rebalance: bool
) -> tuple[PlanChooser, PlanGain | None, PlanMender | None]:
    """What a run's controller decides with. A DeepSpeed engine divides work by DeepSpeed's rule alone."""
    if job.engine is not None:
        return engine_plan_chooser(layout, job.micro_batches, job.engine), None, None
    mender = plan_mender(layout, profile, salvageable(layout, profile, job))
    if job.search is not None:
        chooser, searched_gain = searched_planners(layout, profile, job, job.search)
        return chooser, searched_gain if rebalance else None, mender
    keeping = SHARDINGS[job.sharding].keeping
    teaming = Teaming(job.sequence, job.sequence_slices)
    parts = (layout, profile)
    strategy = Strategy(job.schedule, job.chunks)
    chooser = plan_chooser(*parts, job.micro_batches, stages, strategy, keeping, teaming, job.paths)
    gain = plan_gain(*parts, strategy, teaming, job.paths) if rebalance else None
    return chooser, gain, mender


def searched_planners(
    layout: Layout, profile: Profile, job: Job, space: Space
) -> tuple[PlanChooser, PlanGain]:
    """As ``plan_chooser`` and ``plan_gain``, of plans whose strategy is searched for each time anew."""
    profiled = _profiled(layout, profile, job)

    def costs_of(speeds: Speeds) -> CostModel:
        # a backward's measured seconds depend on the strategy that it ran under, a forward's do not
        paced = profiled.paced(
            [speeds.forward(layer) for layer in range(layout.layers)], job.precision.recompute
        )
        if speeds.bytes_per_second is None:
            return paced
        return replace(
            paced,
            link_bytes_per_second=speeds.bytes_per_second,
            link_seconds_per_message=speeds.seconds_per_message,
        )

    def choose(generation: int, members: Sequence[Member], speeds: Speeds, previous: Plan | None) -> Plan:
        costs = costs_of(speeds)
        plan = searched_plan(generation, members, layout, costs, job.micro_batches, space, previous)
        return replace(plan, keeping=job.sharding_under(plan).keeping)

    def gain(present: Plan, other: Plan, members: Sequence[Member], speeds: Speeds) -> float:
        costs = costs_of(speeds)
        return plan_seconds(present, members, costs) / plan_seconds(other, members, costs) - 1.0

    return choose, gain


def _profiled(layout: Layout, profile: Profile, job: Job) -> CostModel:
    return CostModel.profiled(
        layout,
        profile,
        link_bytes_per_second=job.link_bytes_per_second,
        worker_memory_bytes=job.worker_memory_bytes,
        host_state=job.host_state,
        slices=job.sequence_slices if job.sequence_slices > 1 else None,
    )


def plan_chooser(
    layout: Layout,
    profile: Profile,
    micro_batches: int,
    stages: int | Literal["auto"],
    strategy: Strategy = ONE_F_ONE_B,
    keeping: Keeping = Keeping.PARAMETERS,
    teaming: Teaming = ALONE,
    paths: Paths | None = None,
) -> PlanChooser:
    """The planner with everything filled in that does not change during a run. ``strategy``: the schedule,
    and how many stages every worker holds, where there are layers enough; ``keeping``: what the sharding
    keeps; with ``paths`` the stages are theirs."""

    parameter_bytes = _parameter_bytes(layout)

    def choose(generation: int, members: Sequence[Member], speeds: Speeds, previous: Plan | None) -> Plan:
        costs = _costs(parameter_bytes, profile, speeds)
        if paths is not None:
            asked = (generation, members, layout, costs, micro_batches, stages, previous, paths)
            return replace(choose_path_plan(*asked), keeping=keeping)
        before = None if previous is None else folded(previous)
        plan, _ = choose_plan(generation, members, layout, costs, micro_batches, stages, before)
        seconds = [f + b for f, b in zip(costs.forward_seconds, costs.backward_seconds, strict=True)]
        plan = unfolded(plan, strategy.chunks, layout, members, seconds)
        if strategy != ONE_F_ONE_B and teaming == ALONE:
            plan = cut_for_schedule(plan, strategy, layout, members, costs, before)
        return replace(teamed(plan, teaming, members), keeping=keeping)

    return choose


def plan_gain(
    layout: Layout,
    profile: Profile,
    strategy: Strategy = ONE_F_ONE_B,
    teaming: Teaming = ALONE,
    paths: Paths | None = None,
) -> PlanGain:
    """By how much one plan's pipeline is faster than another's, both simulated with measured speeds."""

    parameter_bytes = _parameter_bytes(layout)

    def gain(present: Plan, other: Plan, members: Sequence[Member], speeds: Speeds) -> float:
        costs = _costs(parameter_bytes, profile, speeds)
        if strategy != ONE_F_ONE_B and teaming == ALONE and paths is None:
            before, after = (replace(plan, strategy=strategy) for plan in (present, other))
            return plan_seconds(before, members, costs) / plan_seconds(after, members, costs) - 1.0
        costs = costs if paths is None else staged_costs(costs, paths)
        speed = {member.worker: member.speed for member in members}
        as_planned = folded if paths is None else grouped
        seconds = [
            simulate_step(
                as_planned(plan),
                costs.forward_seconds,
                costs.backward_seconds,
                speed | speeds_of_teams(plan, teaming, speed),
            )
            for plan in (present, other)
        ]
        return seconds[0] / seconds[1] - 1.0

    return gain


def team_size(job: Job, layout: Layout, profile: Profile, workers: int | None) -> int:
    """How many workers share a micro-batch where there are ``workers``, equally fast (None: nobody is asked
    for): as the job says or, where it is searched for, as the search would have it."""
    if job.search is None or workers is None or max(job.search.sequences) == 1:
        return job.sequence
    members = [Member(worker, str(worker)) for worker in range(workers)]
    costs = _profiled(layout, profile, job)
    try:
        plan = searched_plan(0, members, layout, costs, job.micro_batches, job.search)
    except NothingFits:  # said where the run's own plan is made
        return 1
    assert plan.strategy is not None, "a plan of the search has a strategy"
    return plan.strategy.sequence


def demand(
    layout: Layout,
    profile: Profile,
    micro_batches: int,
    stages: int | Literal["auto"],
    least: int,
    most: int | None,
    sequence: int = 1,
    paths: Paths | None = None,
) -> int | None:
    """How many of ``most`` workers are worth asking for, by what was measured in the warm-up, and at least
    ``least``; None where nobody is asked for. A micro-batch that ``sequence`` workers share counts as so many
    smaller ones."""
    if most is None or most <= least:
        return most
    speeds = Speeds()
    speeds.warm_up(profile.forward, profile.backward)
    costs = _costs(_parameter_bytes(layout), profile, speeds)
    if paths is not None:
        layout, costs = staged_layout(layout, paths), staged_costs(costs, paths)
    costs = replace(
        costs,
        forward_seconds=tuple(seconds / sequence for seconds in costs.forward_seconds),
        backward_seconds=tuple(seconds / sequence for seconds in costs.backward_seconds),
    )
    return useful_workers(layout, costs, micro_batches * sequence, stages, least, most)


def salvageable(layout: Layout, profile: Profile, job: Job) -> Callable[[Plan], bool]:
    """Under which plans an interrupted step can be finished: as the job and the sharding allow it, and where
    plans are searched for within a worker's memory."""
    if job.search is None:
        return job.salvages_under
    costs = _profiled(layout, profile, job)
    return lambda plan: job.salvages_under(plan) and fits(plan, costs)


def plan_mender(layout: Layout, profile: Profile, allows: Callable[[Plan], bool]) -> PlanMender:
    """Finishes an interrupted step under the same cut, where that is allowed and takes less time than doing
    it again."""

    parameter_bytes = _parameter_bytes(layout)

    def mend(
        generation: int,
        members: Sequence[Member],
        speeds: Speeds,
        previous: Plan,
        step: int,
        progress: Mapping[WorkerId, WorkerProgress],
    ) -> tuple[Plan, Salvage] | None:
        costs = _costs(parameter_bytes, profile, speeds)
        seconds = [f + b for f, b in zip(costs.forward_seconds, costs.backward_seconds, strict=True)]
        found = mended(generation, members, layout, previous, step, progress, seconds)
        well = found is not None and allows(found[0]) and pays(*found, members, seconds)
        return found if well else None

    return mend


def _parameter_bytes(layout: Layout) -> tuple[int, ...]:
    return tuple(
        BYTES_PER_PARAMETER * sum(block.size for block in layout.blocks_of(layer, layer + 1))
        for layer in range(layout.layers)
    )


def _costs(parameter_bytes: tuple[int, ...], profile: Profile, speeds: Speeds) -> CostModel:
    layers = range(len(parameter_bytes))
    return CostModel(
        forward_seconds=levelled([speeds.forward(layer) for layer in layers]),
        backward_seconds=levelled([speeds.backward(layer) for layer in layers]),
        parameter_bytes=parameter_bytes,
        boundary_bytes=profile.boundary_bytes,
    )
