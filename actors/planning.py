"""The planner as the controller calls it, fed with what the workers measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from runtime.layout import Layout
from runtime.plan import Member, Plan
from runtime.signals import PlanChooser
from runtime.speeds import Speeds
from strategies.costs import BYTES_PER_PARAMETER, CostModel, levelled
from strategies.planner import choose_plan
from strategies.profile import Profile


def plan_chooser(
    layout: Layout, profile: Profile, micro_batches: int, stages: int | Literal["auto"]
) -> PlanChooser:
    """The planner with everything filled in that does not change during a run."""
    parameter_bytes = tuple(
        BYTES_PER_PARAMETER * sum(block.size for block in layout.blocks_of(layer, layer + 1))
        for layer in range(layout.layers)
    )

    def choose(generation: int, members: Sequence[Member], speeds: Speeds, previous: Plan | None) -> Plan:
        costs = CostModel(
            forward_seconds=levelled([speeds.forward(layer) for layer in range(layout.layers)]),
            backward_seconds=levelled([speeds.backward(layer) for layer in range(layout.layers)]),
            parameter_bytes=parameter_bytes,
            boundary_bytes=profile.boundary_bytes,
        )
        plan, _ = choose_plan(generation, members, layout, costs, micro_batches, stages, previous)
        return plan

    return choose
