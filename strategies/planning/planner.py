"""Members and measured costs in, the plan with the least predicted step time out.

The planner weighs a handful of candidates: keep the cut and only re-deal micro-batches, keep the cut
and regroup workers, cut the layers anew for every allowed number of stages, or leave slow workers out. A
candidate's score is its predicted step plus its share of the time that moving parameters and state
takes (``ranking``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from runtime.layout import Layout
from runtime.plan import Member, Plan, WorkerId
from strategies.planning.candidates import MANY, divisions_of, sized_divisions, spread_over_domains
from strategies.planning.costs import CostModel, Division, Predictor
from strategies.planning.partition import MOST_STAGES
from strategies.planning.ranking import assign, ranked, score, stages_of, step_seconds
from strategies.sharding import shard_blocks

__all__ = ["CandidateScore", "CostModel", "Prediction", "choose_plan", "predicted_gain"]

ROOM = 4 / 3
"""Where only a number of stages is asked for, the workers' memory is not known. A plan may then take this
many times what an even division into so many stages would take, and has one stage fewer if that helps."""

SLOW = 0.8
"""Workers slower than this, beside the median, may be left out of the plan."""

LEFT_OUT_SINGLY = 3
"""The plan is tried without the slowest, the two slowest, ... up to this many, and without all slow ones."""


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """One division that was weighed; ``score`` as in ``ranking.Candidate``."""

    name: str
    stages: int
    step_seconds: float
    move_bytes: int
    score: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the chosen plan is expected to cost, and what it was weighed against (best first).

    ``move_bytes`` is an upper bound over all links; ``reason`` is a sentence for the event log.
    ``left_out`` are the members, ascending, that the plan is faster without.
    """

    step_seconds: float
    move_bytes: int
    move_seconds: float
    reason: str
    candidates: tuple[CandidateScore, ...]
    left_out: tuple[WorkerId, ...] = ()


def choose_plan(
    generation: int,
    members: Sequence[Member],
    layout: Layout,
    costs: CostModel,
    micro_batches: int,
    stages: int | Literal["auto"] = "auto",
    previous: Plan | None = None,
) -> tuple[Plan, Prediction]:
    """Divides the work among ``members``; any number of them from one up.

    ``stages`` asks for min(stages, workers, layers) stages; "auto" tries 1 to 8. After a change
    (``previous`` is given) three or more stages may become one fewer where that is faster and takes
    little more memory (``ROOM``). Where no division fits ``costs.worker_memory_bytes`` the one that
    needs the least memory is taken, and the reason says so: going on with a warning beats stopping.
    A worker so slow that everybody else waits for it is left out (``Prediction.left_out``).
    Pure and independent of the order of ``members``.

    Raises ValueError for no members, a repeated one, a speed, stage or micro-batch count below 1
    (0 for speeds), or costs that do not fit the layout.
    """
    _check(members, layout, costs, micro_batches, stages)
    assert previous is None or previous.stages[-1].stop == layout.layers, "a plan of another model"
    members = sorted(members, key=lambda member: member.worker)
    predictor = Predictor(costs, members, micro_batches, previous)
    divisions: dict[Division, str] = {}
    for present in _subsets(members):
        for division, name in _divisions(predictor, present, stages, previous).items():
            divisions.setdefault(division, name)
    limit = costs.worker_memory_bytes
    fitting = {d: n for d, n in divisions.items() if limit is None or predictor.memory_bytes(d) <= limit}
    if not fitting:
        leanest = min(divisions, key=predictor.memory_bytes)
        candidates = [score(predictor, leanest, divisions[leanest])]
    else:
        candidates = ranked(predictor, fitting, limit)
    chosen = candidates[0]
    plan_stages = stages_of(chosen.division)
    assignment = assign(chosen.division, predictor)
    plan = Plan(generation, plan_stages, assignment, shard_blocks(layout, plan_stages, members))
    at_work = set(plan.workers)
    left_out = tuple(member.worker for member in members if member.worker not in at_work)
    reason = f"{chosen.name}: {len(plan_stages)} stages, {chosen.step_seconds:.4g} s a step predicted"
    if left_out:
        reason += f"; faster without worker{'s' * (len(left_out) > 1)} {', '.join(map(str, left_out))}"
    if not fitting:
        needed = predictor.memory_bytes(chosen.division)
        reason += f"; no division fits {limit} bytes of memory per worker, this one needs {needed}"
    scores = tuple(
        CandidateScore(c.name, len(c.division.groups), c.step_seconds, c.move_bytes, c.score)
        for c in candidates
    )
    return plan, Prediction(
        chosen.step_seconds, chosen.move_bytes, chosen.move_seconds, reason, scores, left_out
    )


def predicted_gain(present: Plan, other: Plan, members: Sequence[Member], costs: CostModel) -> float:
    """By how much steps of ``other`` are predicted to be faster than those of ``present``, as both are dealt
    and with the members' present speeds: 0.1 = a tenth. Moving is not counted."""
    return step_seconds(present, members, costs) / step_seconds(other, members, costs) - 1.0


def _subsets(members: Sequence[Member]) -> Iterator[list[Member]]:
    """All members, then all but the slowest few, if those are slow and state stays safe without them."""
    yield list(members)
    domains = min(2, len({member.domain for member in members}))
    typical = median(member.speed for member in members)
    slow = sorted((m for m in members if m.speed < SLOW * typical), key=lambda m: (m.speed, m.worker))
    if len(members) > MANY:
        return  # in a large group whoever is too slow for one micro-batch is dealt none, and that is enough
    for count in sorted({*range(1, min(len(slow), LEFT_OUT_SINGLY) + 1), len(slow)} - {0}):
        left_out = {member.worker for member in slow[:count]}
        rest = [member for member in members if member.worker not in left_out]
        if len(rest) > 1 and len({member.domain for member in rest}) >= domains:
            yield rest


def _divisions(
    predictor: Predictor, members: Sequence[Member], stages: int | Literal["auto"], previous: Plan | None
) -> dict[Division, str]:
    """The candidates for these members. Those that take too much memory are left out, unless all do."""
    limit: float | None = predictor.costs.worker_memory_bytes
    most = min(len(predictor.layer_seconds), len(members))
    if stages == "auto":
        counts: tuple[int, ...] = tuple(range(1, min(most, MOST_STAGES) + 1))
    else:
        asked = min(stages, most)
        counts = (asked - 1, asked) if previous is not None and asked > 2 else (asked,)
        if limit is None:
            limit = ROOM * predictor.even_memory_bytes(asked, len(members))
    limited = predictor.costs.worker_memory_bytes is not None
    spread = spread_over_domains(members)
    found = divisions_of(predictor, spread, counts, previous, limited=limited)
    found = {d: n for d, n in found.items() if limit is None or predictor.memory_bytes(d) <= limit}
    for division, name in sized_divisions(predictor, spread, counts, previous, limit).items():
        if limit is None or predictor.memory_bytes(division) <= limit:
            found.setdefault(division, name)
    return found or divisions_of(predictor, spread, counts, previous, limited=False)


def _check(
    members: Sequence[Member],
    layout: Layout,
    costs: CostModel,
    micro_batches: int,
    stages: int | Literal["auto"],
) -> None:
    if not members:
        raise ValueError("a plan needs at least one worker; start or wait for one")
    if len({member.worker for member in members}) < len(members):
        raise ValueError("a worker is listed twice; list each member once")
    if any(member.speed <= 0 for member in members):
        raise ValueError("a worker's speed is not positive; leave a stopped worker out instead")
    if micro_batches < 1 or (stages != "auto" and stages < 1):
        raise ValueError('micro_batches and stages must be at least 1; stages may be "auto"')
    for name, values in (
        ("forward_seconds", costs.forward_seconds),
        ("backward_seconds", costs.backward_seconds),
        ("parameter_bytes", costs.parameter_bytes),
    ):
        if len(values) != layout.layers:
            raise ValueError(f"costs.{name} has {len(values)} entries; give one per layer: {layout.layers}")
