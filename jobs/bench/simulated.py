"""What the planner's simulation says of a bench whose layers' compute is emulated, and whether the machine
was quiet enough for what was measured to count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from runtime.layout import ALIGNMENT, Block, Layout
from runtime.plan import Member, Plan, WorkerId
from strategies.planning.planner import CostModel, choose_plan
from strategies.planning.ranking import step_seconds

SOUND = 1.25
"""How many times the simulated seconds an undisturbed step may take. If it takes longer, workers wait for the
machine's cores rather than for each other, and fewer of them would look better than they are."""


@dataclass
class Simulated:
    """Equal layers that take ``forward_seconds``, twice that backward, on ``workers`` equal workers."""

    workers: int
    stages: int | Literal["auto"]
    layers: int
    micro_batches: int
    forward_seconds: float
    _layout: Layout = field(init=False)
    _costs: CostModel = field(init=False)

    def __post_init__(self) -> None:
        blocks = tuple(Block(layer, f"layer{layer}", (layer,), (), ALIGNMENT) for layer in range(self.layers))
        self._layout = Layout(self.layers, blocks, ())
        self._costs = CostModel.unmeasured(self._layout, self.forward_seconds)

    def _planned(self, generation: int, members: Sequence[Member], previous: Plan | None) -> Plan:
        plan, _ = choose_plan(
            generation, members, self._layout, self._costs, self.micro_batches, self.stages, previous
        )
        return plan

    def _members(self) -> list[Member]:
        return [Member(worker, "here") for worker in range(self.workers)]

    def after_losses(self, losses: int, victim: Callable[[Plan], WorkerId]) -> list[float]:
        """Seconds of a step undisturbed and after each of ``losses`` losses, of ``victim`` of the plan."""
        members = self._members()
        plan = self._planned(0, members, None)
        seconds = [step_seconds(plan, members, self._costs)]
        for lost in range(1, losses + 1):
            gone = victim(plan)
            members = [member for member in members if member.worker != gone]
            plan = self._planned(lost, members, plan)
            seconds.append(step_seconds(plan, members, self._costs))
        return seconds

    def slowed(self, speed: float) -> list[float]:
        """Seconds of a step undisturbed, with the last worker at ``speed``, and after a new division."""
        members = self._members()
        even = self._planned(0, members, None)
        slow = [*members[:-1], replace(members[-1], speed=speed)]
        anew = self._planned(1, slow, even)
        return [
            step_seconds(even, members, self._costs),
            step_seconds(even, slow, self._costs),
            step_seconds(anew, slow, self._costs),
        ]


def disturbance(measured_seconds: float, simulated_seconds: float) -> str | None:
    """A sentence that says why an undisturbed step is no measure, or None where it is one."""
    if measured_seconds <= SOUND * simulated_seconds:
        return None
    return (
        f"undisturbed steps took {measured_seconds / simulated_seconds:.2f} times what they take on a quiet "
        f"machine (up to {SOUND} counts): the shares are no measure, and the goal does not count as met; "
        "run the bench again when nothing else runs"
    )
