"""Stage groups dealt into teams, and micro-batches over teams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from runtime.plan import Member, Plan, WorkerId
from strategies.planning.partition import deal_micro_batches
from strategies.sequence.division import team_sizes, team_speed


@dataclass(frozen=True, slots=True)
class Teaming:
    """Teams have up to ``most`` workers, each of which has at least one of the ``slices`` of a sequence."""

    most: int
    slices: int


ALONE = Teaming(1, 1)
"""Every worker computes its micro-batches by itself."""


def teamed(plan: Plan, teaming: Teaming, members: Sequence[Member]) -> Plan:
    """``plan`` with every stage group dealt into teams, and its micro-batches over them by their speed.

    Teams are as few as can be and as even as can be; workers of one failure domain come together, for they
    talk much. Pure, and independent of the order of ``members``.
    """
    if teaming.most == 1:
        return plan
    known = {member.worker: member for member in members}
    rows: dict[tuple[WorkerId, ...], tuple[WorkerId, ...]] = {}
    teams: list[tuple[WorkerId, ...]] = []
    for stage in plan.stages:
        if stage.workers in rows:
            continue
        order = sorted(stage.workers, key=lambda worker: (known[worker].domain, worker))
        group: list[tuple[WorkerId, ...]] = []
        for size in team_sizes(len(order), teaming.most):
            group.append(tuple(order[:size]))
            del order[:size]
        speeds = [
            (team[0], team_speed([known[worker].speed for worker in team], teaming.slices)) for team in group
        ]
        rows[stage.workers] = deal_micro_batches(speeds, plan.micro_batches)
        teams += [team for team in group if len(team) > 1]
    assignment = tuple(rows[stage.workers] for stage in plan.stages)
    return replace(plan, assignment=assignment, teams=tuple(teams))


def speeds_of_teams(plan: Plan, teaming: Teaming, speed: Mapping[WorkerId, float]) -> dict[WorkerId, float]:
    """How fast those who lead a team are with it; workers that nobody knows count as usual ones."""
    return {
        team[0]: team_speed([speed.get(worker, 1.0) for worker in team], teaming.slices)
        for team in plan.teams
    }
