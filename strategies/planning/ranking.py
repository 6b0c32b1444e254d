"""Candidates ranked by predicted step time: all by closed formulas, the best of them by simulation.

The planner runs while a recovery waits, so simulations are rationed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean as mean

from runtime.plan import Member, Plan, Stage, WorkerId
from strategies.planning.costs import CostModel, Division, Predictor
from strategies.planning.partition import deal_micro_batches, group_rounds
from strategies.planning.step_time import StageTimes, simulate_pipeline, simulate_step
from strategies.schedules.limits import group_limit

SIMULATED_TASKS = 8_000
"""How many forwards and backwards the first round of simulations may take, about 0.7 us each. One
simulation takes 2 x stages x micro-batches."""

REFINED_TASKS = 20_000
"""So many more may go into refining the best."""

LARGEST_RANKED = 1_500
"""Tasks. A larger plan is simulated in proportion: with a q-th of the workers of every group and of the
micro-batches. How far that stays behind the closed formula is how far the whole does."""

REFINED_CANDIDATES = 3

UNSTEADINESS = 0.04
"""Relative; what ``simulate_pipeline`` is told. Plans that were chosen as if everybody were exactly on
time ran up to 9% slower than predicted on real workers."""

DRAWS = 3
"""So many simulations, of which the mean counts, has whatever is taken for the best: by one of them the best
looked as good as they did by luck."""


LEAVING_GAIN = 0.02
"""By how much a plan must be faster for every worker it leaves out: less is within what a simulation's
details may account for, and a worker without work cannot show that it is fast again."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A division and what it is predicted to cost. ``score`` = (step seconds + move seconds / amortised
    steps) x (1 + ``LEAVING_GAIN`` x workers left out)."""

    name: str
    division: Division
    step_seconds: float
    move_bytes: int
    move_seconds: float
    score: float

    def rank(self) -> tuple[float, int, int]:
        # Scores equal to six digits are equal: summation order must not decide, moved bytes do.
        return (float(f"{self.score:.6g}"), self.move_bytes, len(self.division.groups))


def score(
    predictor: Predictor, division: Division, name: str, pipeline_seconds: float | None = None
) -> Candidate:
    """``pipeline_seconds``: the closed formula's if None."""
    if pipeline_seconds is None:
        pipeline_seconds = predictor.pipeline_seconds(division)
    step = pipeline_seconds + predictor.communication_seconds(division)
    move_bytes, move_seconds = predictor.moves(division)
    total = step + move_seconds / predictor.costs.amortised_steps
    left_out = len(predictor.speed) - sum(len(group) for group in division.groups)
    total *= 1 + LEAVING_GAIN * left_out
    return Candidate(name, division, step, move_bytes, move_seconds, total)


def ranked(
    predictor: Predictor, divisions: Mapping[Division, str], memory_limit: float | None
) -> list[Candidate]:
    """Candidates, the best first. Those that were simulated come before those that were not worth it."""
    candidates = sorted((score(predictor, d, n) for d, n in divisions.items()), key=Candidate.rank)
    simulation = _Simulation(predictor, SIMULATED_TASKS)
    simulated: list[Candidate] = []
    for candidate in candidates:
        least = min((each.score for each in simulated), default=float("inf"))
        if candidate.score > least or not simulation.affords(candidate.division):
            break
        simulated.append(simulation.score(candidate))
    rest = candidates[len(simulated) :]
    simulation.left += REFINED_TASKS if simulated else 0
    simulated = simulation.confirmed(simulated)
    refined = [simulation.refine(c, memory_limit) for c in simulated[:REFINED_CANDIDATES]]
    return sorted({c.division: c for c in [*refined, *simulated]}.values(), key=Candidate.rank) + rest


def step_seconds(plan: Plan, members: Sequence[Member], costs: CostModel) -> float:
    """What a step of ``plan`` as it is dealt takes while the workers have the speeds of ``members``.

    The predictor's view of a division that was made for other speeds. Workers that are no members count
    as speed 1.0. Simulated up to ``SIMULATED_TASKS``, by the closed formula beyond.
    """
    speed = dict.fromkeys(plan.workers, 1.0)
    speed.update((member.worker, member.speed) for member in members if member.worker in speed)
    present = [Member(worker, "", speed[worker]) for worker in plan.workers]
    predictor = Predictor(costs, present, plan.micro_batches, None)
    division = Division((0, *(stage.stop for stage in plan.stages)), tuple(s.workers for s in plan.stages))
    if 2 * len(plan.stages) * plan.micro_batches <= SIMULATED_TASKS:
        ways = costs.forward_seconds, costs.backward_seconds
        seconds = mean(simulate_step(plan, *ways, speed, UNSTEADINESS, draw) for draw in range(DRAWS))
    else:
        passes, longest = 0.0, 0.0
        for stage, assigned in zip(plan.stages, plan.assignment, strict=True):
            each = predictor.seconds_of(stage.first, stage.stop)
            once = each * predictor.once(stage.workers)
            rounds = max(count / speed[worker] for worker, count in Counter(assigned).items())
            passes, longest = passes + once, max(longest, each * rounds - once)
        seconds = passes + longest
    return seconds + predictor.communication_seconds(division)


class _Simulation:
    """Scores candidates by simulating their pipeline, as long as ``left`` tasks last."""

    def __init__(self, predictor: Predictor, tasks: int) -> None:
        self._predictor = predictor
        self.left = tasks
        self._seconds: dict[tuple[object, ...], float] = {}

    def affords(self, division: Division) -> bool:
        return self._tasks(division) <= self.left

    def score(self, candidate: Candidate, draws: int = 1) -> Candidate:
        """By the mean of the first ``draws`` simulations."""
        seconds = mean(self._pipeline_seconds(candidate.division, draw) for draw in range(draws))
        return score(self._predictor, candidate.division, candidate.name, seconds)

    def confirmed(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Sorted, once whoever comes first has been simulated ``DRAWS`` times, or as often as that goes.

        Large ones, in which luck evens out, are taken as they are."""
        draws = dict.fromkeys((each.division for each in candidates), 1)
        found = sorted(candidates, key=Candidate.rank)
        while found and draws[found[0].division] < DRAWS and self.affords(found[0].division):
            first = found[0]
            if self._scale(first.division) > 1:
                break
            draws[first.division] += 1
            found[0] = self.score(first, draws[first.division])
            found.sort(key=Candidate.rank)
        return found

    def refine(self, candidate: Candidate, memory_limit: float | None) -> Candidate:
        """One change at a time while that lowers the rank (hill climbing)."""
        if self._scale(candidate.division) > 1:
            return candidate  # a sample of the workers is too coarse for that
        best, previous = self.score(candidate, DRAWS), None
        while best is not previous:
            previous = best
            for division in _neighbours(best.division):
                if memory_limit is not None and self._predictor.memory_bytes(division) > memory_limit:
                    continue
                if not self.affords(division):
                    return best
                changed = self.score(Candidate(f"{candidate.name}, refined", division, 0.0, 0, 0.0, 0.0))
                if changed.rank() < best.rank():
                    changed = self.score(changed, DRAWS)
                if changed.rank() < best.rank():
                    best = changed
                    break
        return best

    def _scale(self, division: Division) -> int:
        return -(-2 * len(division.groups) * self._predictor.micro_batches // LARGEST_RANKED)

    def _tasks(self, division: Division) -> int:
        return 2 * len(division.groups) * self._predictor.micro_batches // self._scale(division)

    def _pipeline_seconds(self, division: Division, draw: int) -> float:
        predictor = self._predictor
        # who is who does not matter to the pipeline
        speeds = [tuple(map(predictor.speed.__getitem__, group)) for group in division.groups]
        key = (draw, division.bounds, *speeds)
        if key not in self._seconds:
            self.left -= self._tasks(division)
            scale = self._scale(division)
            seconds, formula = _simulated(predictor, division, speeds, scale, draw)
            if scale > 1:
                seconds *= predictor.pipeline_seconds(division) / formula
            self._seconds[key] = seconds
        return self._seconds[key]


def _simulated(
    predictor: Predictor, division: Division, speeds: Sequence[Sequence[float]], scale: int, draw: int
) -> tuple[float, float]:
    """(seconds of the simulated pipeline, those of the closed formula) at one ``scale``-th of the size."""
    micro_batches = max(round(predictor.micro_batches / scale), 1)
    if scale > 1:
        speeds = [_sample(each, max(round(len(each) / scale), 1)) for each in speeds]
    bounds = list(division.stages())
    shape = [(stop - first, len(each)) for (first, stop, _), each in zip(bounds, speeds, strict=True)]
    times, passes, longest = [], 0.0, 0.0
    for k, (first, stop, _) in enumerate(bounds):
        forward, backward = predictor.seconds_each_way(first, stop)
        row = deal_micro_batches(list(enumerate(speeds[k])), micro_batches)
        times.append(StageTimes(forward, backward, speeds[k], row, group_limit(shape, k)))
        once = (forward + backward) * len(speeds[k]) / sum(speeds[k])
        passes += once
        longest = max(longest, (forward + backward) * group_rounds(speeds[k], micro_batches) - once)
    return simulate_pipeline(times, UNSTEADINESS, draw), passes + longest


def _sample(speeds: Sequence[float], count: int) -> list[float]:
    """``count`` speeds that stand for all: evenly spaced ones of the sorted."""
    ordered = sorted(speeds)
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def _neighbours(division: Division) -> Iterator[Division]:
    """Every division in which one layer changed to a neighbouring stage, all stages keeping one, or two
    neighbouring stages changed places with their layers and workers."""
    bounds, groups = division.bounds, division.groups
    for k in range(1, len(bounds) - 1):
        for bound in (bounds[k] + 1, bounds[k] - 1):
            if bounds[k - 1] < bound < bounds[k + 1]:
                yield Division((*bounds[:k], bound, *bounds[k + 1 :]), groups)
        if len(groups[k - 1]) != len(groups[k]):
            between = bounds[k - 1] + bounds[k + 1] - bounds[k]
            swapped = (*groups[: k - 1], groups[k], groups[k - 1], *groups[k + 1 :])
            yield Division((*bounds[:k], between, *bounds[k + 1 :]), swapped)


def stages_of(division: Division) -> tuple[Stage, ...]:
    return tuple(Stage(first, stop, group) for first, stop, group in division.stages())


def assign(division: Division, predictor: Predictor) -> tuple[tuple[WorkerId, ...], ...]:
    """``Plan.assignment``: every group's micro-batches dealt by speed."""
    speed = predictor.speed
    return tuple(
        deal_micro_batches([(worker, speed[worker]) for worker in group], predictor.micro_batches)
        for group in division.groups
    )
