"""What a controller that was started anew concludes from what the workers tell it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.plan import Plan, WorkerId
from runtime.protocol import Here


@dataclass(frozen=True)
class Standing:
    """``plan`` is the newest that anybody follows, None before the first; ``missing`` its workers that did
    not answer. ``undisturbed``: everybody follows it and no change is under way, so that nothing has to be
    done. ``generation`` is the newest that anybody entered or heard of."""

    plan: Plan | None
    generation: int
    version: int
    missing: tuple[WorkerId, ...]
    undisturbed: bool


def standing(answers: Mapping[WorkerId, Here]) -> Standing:
    """Where the run stands. A change that only some have heard of can never take place, since all have to
    agree on it; a change that some have made while others were cut off has to be sorted out anew."""
    plans: Sequence[Plan] = [here.plan for here in answers.values() if here.plan is not None]
    generation = max((max(here.generation, here.pending or 0) for here in answers.values()), default=0)
    if not plans:
        return Standing(None, generation, 0, (), False)
    plan = max(plans, key=lambda each: each.generation)
    missing = tuple(worker for worker in plan.workers if worker not in answers)
    followers = [answers[worker] for worker in plan.workers if worker in answers]
    undisturbed = not missing and all(
        here.plan is not None
        and here.plan.generation == plan.generation == here.generation
        and here.pending is None
        for here in followers
    )
    version = max(here.version for here in answers.values())
    return Standing(plan, generation, version, missing, undisturbed)
