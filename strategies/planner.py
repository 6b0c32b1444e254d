"""Members and measured costs in, the plan with the least predicted step time out.

The planner weighs a handful of candidates: keep the cut and only re-deal micro-batches, keep the cut
and regroup workers, or cut the layers anew for every allowed number of stages. A candidate's
score is its predicted step plus its share of the time that moving parameters and state takes. It
runs while a recovery waits, so it ranks candidates by closed formulas and simulates only the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.layout import Layout
from runtime.plan import Member, Plan, Stage, WorkerId
from strategies.candidates import divisions_of
from strategies.costs import CostModel, Division, Predictor
from strategies.partition import deal_micro_batches
from strategies.schedule import simulate_step
from strategies.sharding import shard_blocks

__all__ = ["CandidateScore", "CostModel", "Prediction", "choose_plan"]

MOST_STAGES = 8
"""Up to how many stages "auto" tries."""

SIMULATED_CANDIDATES = 4
SIMULATED_EVENTS = 256
"""How many of the best candidates are simulated, while stages x micro-batches is no more than this
(about 1 ms for one of 256). Larger plans go by the closed formula alone."""

REFINED_CANDIDATES = 2
REFINED_SIMULATIONS = 24
"""How many of the best simulated candidates are refined, and how many more simulations all of that may
take: cuts of the same largest load differ by several percent in their pipelines' gaps."""


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """One division that was weighed. ``score`` = step seconds + move seconds / amortised steps."""

    name: str
    stages: int
    step_seconds: float
    move_bytes: int
    score: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the chosen plan is expected to cost, and what it was weighed against (best first).

    ``move_bytes`` is an upper bound over all links; ``reason`` is a sentence for the event log.
    """

    step_seconds: float
    move_bytes: int
    move_seconds: float
    reason: str
    candidates: tuple[CandidateScore, ...]


@dataclass(frozen=True, slots=True)
class _Candidate:
    name: str
    division: Division
    step_seconds: float
    move_bytes: int
    move_seconds: float
    score: float

    def rank(self) -> tuple[float, int, int]:
        # Scores equal to six digits are equal: summation order must not decide, moved bytes do.
        return (float(f"{self.score:.6g}"), self.move_bytes, len(self.division.groups))


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

    ``stages`` asks for min(stages, workers, layers) stages; "auto" tries 1 to 8. Where no division fits
    ``costs.worker_memory_bytes`` the one that needs the least memory is taken, and the reason says so:
    going on with a warning beats stopping. Pure and independent of the order of ``members``.

    Raises ValueError for no members, a repeated one, a speed, stage or micro-batch count below 1
    (0 for speeds), or costs that do not fit the layout.
    """
    _check(members, layout, costs, micro_batches, stages)
    assert previous is None or previous.stages[-1].stop == layout.layers, "a plan of another model"
    members = sorted(members, key=lambda member: member.worker)
    most = min(layout.layers, len(members))
    counts = range(1, min(most, MOST_STAGES) + 1) if stages == "auto" else (min(stages, most),)
    predictor = Predictor(costs, members, micro_batches, previous)

    limit = costs.worker_memory_bytes
    divisions = divisions_of(predictor, members, counts, previous, limited=True)
    if limit is not None:
        divisions = {d: n for d, n in divisions.items() if predictor.memory_bytes(d) <= limit}
    fits = bool(divisions)
    if not fits:
        divisions = divisions_of(predictor, members, counts, previous, limited=False)
        leanest = min(divisions, key=predictor.memory_bytes)
        divisions = {leanest: divisions[leanest]}

    candidates = sorted((_score(predictor, d, n) for d, n in divisions.items()), key=_Candidate.rank)
    simulation = _Simulation(predictor)
    best = [simulation.score(c) for c in candidates[:SIMULATED_CANDIDATES]]
    best.sort(key=_Candidate.rank)
    refined = [simulation.refine(c, limit) for c in best[:REFINED_CANDIDATES]]
    best = sorted({c.division: c for c in [*refined, *best]}.values(), key=_Candidate.rank)
    candidates = best + candidates[SIMULATED_CANDIDATES:]
    chosen = candidates[0]
    plan_stages, assignment = _assign(chosen.division, predictor)
    plan = Plan(generation, plan_stages, assignment, shard_blocks(layout, plan_stages, members))
    reason = f"{chosen.name}: {len(plan_stages)} stages, {chosen.step_seconds:.4g} s a step predicted"
    if not fits:
        needed = predictor.memory_bytes(chosen.division)
        reason += f"; no division fits {limit} bytes of memory per worker, this one needs {needed}"
    scores = tuple(
        CandidateScore(c.name, len(c.division.groups), c.step_seconds, c.move_bytes, c.score)
        for c in candidates
    )
    return plan, Prediction(chosen.step_seconds, chosen.move_bytes, chosen.move_seconds, reason, scores)


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


def _score(
    predictor: Predictor, division: Division, name: str, pipeline_seconds: float | None = None
) -> _Candidate:
    if pipeline_seconds is None:
        pipeline_seconds = predictor.pipeline_seconds(division)
    step = pipeline_seconds + predictor.communication_seconds(division)
    move_bytes, move_seconds = predictor.moves(division)
    score = step + move_seconds / predictor.costs.amortised_steps
    return _Candidate(name, division, step, move_bytes, move_seconds, score)


class _Simulation:
    """Scores candidates by simulating their pipeline, where that is not too large to be worth it."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._seconds: dict[tuple[object, ...], float] = {}
        self._left = REFINED_SIMULATIONS

    def score(self, candidate: _Candidate) -> _Candidate:
        if not self._worth_it(candidate.division):
            return candidate
        seconds = self._pipeline_seconds(candidate.division)
        return _score(self._predictor, candidate.division, candidate.name, seconds)

    def refine(self, candidate: _Candidate, memory_limit: int | None) -> _Candidate:
        """Moves one layer over one bound at a time while that lowers the rank (hill climbing)."""
        best, previous = candidate, None
        while best is not previous and self._worth_it(best.division):
            previous = best
            for division in _shifted(best.division):
                if memory_limit is not None and self._predictor.memory_bytes(division) > memory_limit:
                    continue
                if self._left == 0:
                    return best
                self._left -= 1
                seconds = self._pipeline_seconds(division)
                shifted = _score(self._predictor, division, f"{candidate.name}, refined", seconds)
                if shifted.rank() < best.rank():
                    best = shifted
                    break
        return best

    def _worth_it(self, division: Division) -> bool:
        return len(division.groups) * self._predictor.micro_batches <= SIMULATED_EVENTS

    def _pipeline_seconds(self, division: Division) -> float:
        predictor = self._predictor
        # who is who does not matter to the pipeline
        shape = (division.bounds, *(tuple(predictor.speed[w] for w in g) for g in division.groups))
        if shape not in self._seconds:
            costs = predictor.costs
            plan = Plan(0, *_assign(division, predictor), ())
            self._seconds[shape] = simulate_step(
                plan, costs.forward_seconds, costs.backward_seconds, predictor.speed
            )
        return self._seconds[shape]


def _shifted(division: Division) -> Iterator[Division]:
    """Every division in which one layer changed to a neighbouring stage, all stages keeping one."""
    bounds = division.bounds
    for k in range(1, len(bounds) - 1):
        for bound in (bounds[k] + 1, bounds[k] - 1):
            if bounds[k - 1] < bound < bounds[k + 1]:
                yield Division((*bounds[:k], bound, *bounds[k + 1 :]), division.groups)


def _assign(
    division: Division, predictor: Predictor
) -> tuple[tuple[Stage, ...], tuple[tuple[WorkerId, ...], ...]]:
    stages = tuple(Stage(first, stop, group) for first, stop, group in division.stages())
    speed = predictor.speed
    assignment = tuple(
        deal_micro_batches([(worker, speed[worker]) for worker in stage.workers], predictor.micro_batches)
        for stage in stages
    )
    return stages, assignment
