"""Every strategy weighed: the best few of a space, by the cost model and then by their own schedules.

The cost model is exact for pipelines of equals; what unequal groups and odd numbers of micro-batches cost
beyond it, a simulation of the schedule says (``schedules.simulation``), for those that are near the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from runtime.plan import Strategy
from strategies.schedules.pipeline_time import pipeline_seconds
from strategies.schedules.simulation import StageSeconds
from strategies.search.best_first import BestFirst
from strategies.search.cost import Problem, evaluate, stage_seconds
from strategies.search.dynamic import Choice, CutSearch
from strategies.search.formulas import FORMULAS
from strategies.search.shortest import NEVER
from strategies.search.space import Combination, Space, combinations
from strategies.shardings.registry import DEFAULT

NEAR = 0.1
"""Relative: what the cost model puts further behind the best than this is not simulated."""

LARGEST_SIMULATION = 600
"""Tasks of one simulation, about 6 us each. A larger step is simulated in proportion."""


Simulated = dict[object, tuple[float, float]]
"""What ``_pipelines`` says, by what makes a difference to it."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A strategy with its cut, for groups of ``sizes`` workers, and what is predicted of it.

    ``step_seconds`` are simulated where ``simulated`` says so, by the cost model elsewhere; ``bubble`` is the
    share of the workers' time in a step in which they do not compute, ``memory_bytes`` those of the fullest.
    """

    strategy: Strategy
    bounds: tuple[int, ...]
    sizes: tuple[int, ...]
    step_seconds: float
    memory_bytes: int
    bubble: float
    simulated: bool = False


class NothingFits(ValueError):
    """No choice fits the memory; the message says what is missing."""


def search(
    problem: Problem,
    space: Space,
    workers: int,
    limit: int | None,
    *,
    most: int = 1,
    simulated: int = 0,
    tolerance: float = 0.0,
) -> list[Proposal]:
    """The ``most`` best strategies for ``workers`` equal workers of ``limit`` bytes (None: plenty) each, the
    best first; one for each schedule, number of stages and chunks, sharding, sequence degree and way to size
    the groups. Of the ``simulated`` best those that are ``NEAR`` are simulated and sorted by that.
    ``tolerance``: the cost model's best may be missed by so much, relatively, to save time. Pure.

    Raises NothingFits where none fits, with the least memory with which one would, or because ``space`` has
    nothing for so many workers and layers.
    """
    found = search_within(problem, space, workers, limit, most=most, simulated=simulated, tolerance=tolerance)
    if not found:
        raise NothingFits(missing(problem, space, workers, limit))
    return found


@dataclass(frozen=True, slots=True)
class Present:
    """What workers are at: ``strategy``, in so many ``groups``. Only what takes less time by more than
    ``kept``, relatively, is wanted in its place."""

    strategy: Strategy
    groups: int
    kept: float

    def is_like(self, strategy: Strategy, groups: int) -> bool:
        """Whether it is the same but for where layers are cut and which are recomputed."""
        if groups != self.groups or strategy.schedule != self.strategy.schedule:  # as most are not
            return False
        return replace(strategy, recompute=self.strategy.recompute) == self.strategy


def search_within(
    problem: Problem,
    space: Space,
    workers: int,
    limit: int | None,
    *,
    most: int = 1,
    simulated: int = 0,
    tolerance: float = 0.0,
    present: Present | None = None,
    near: float = math.inf,
) -> list[Proposal]:
    """As ``search``; nothing where nothing fits, which is said in less time than what is missing. None of
    what is new is further behind the best of that than ``near``, relatively, by the cost model.

    With ``present`` nothing is said of what is not better than it, first by the cost model, then, where that
    finds nothing, than its simulation. It is among the proposals itself, simulated, where it is no more
    behind than twice what it may be.
    """
    cuts = CutSearch(problem, limit, space.recompute, tolerance)
    possible = _possible(problem, space, workers)
    place_of = {each: place for place, each in enumerate(possible)}
    count = max(most, simulated)
    known: Simulated = {}
    if present is None:
        found = BestFirst(cuts, place_of, NEVER, near).choices(possible, count)
        return _proposals(problem, found, simulated, known, alone=math.isinf(near))[:most]
    alike = [each for each in possible if present.is_like(each.strategy, len(each.sizes))]
    like = {*alike}
    others = [each for each in possible if each not in like]
    # as many as there are ways to size so many groups, which the cost model may not tell apart
    here = BestFirst(cuts, place_of, NEVER, near).choices(alike, len(alike))
    seconds = here[0].cost.step_seconds if here else NEVER
    found = BestFirst(cuts, place_of, seconds / (1 + present.kept), near).choices(others, count)
    if found and found[0].cost.step_seconds * (1 + 2 * present.kept) < seconds:
        return _proposals(problem, found, simulated, known, alone=False)[:most]
    staying = sorted((_proposal(problem, each, known) for each in here), key=_order)[:1]
    if staying and not found:
        enough = staying[0].step_seconds / (1 + present.kept)
        if enough > seconds:  # it is longer by more than is let pass: there may be something after all
            found = BestFirst(cuts, place_of, enough, near).choices(others, count)
    return sorted(staying + _proposals(problem, found, simulated, known, alone=bool(staying)), key=_order)


def _proposals(
    problem: Problem, found: Sequence[Choice], simulated: int, known: Simulated, *, alone: bool
) -> list[Proposal]:
    """The best first. One that is ``alone`` is simulated if that is said: there may be nothing to compare it
    with. Nor is there where all have the same pipeline."""
    close = found[0].cost.step_seconds * (1 + NEAR) if found else 0.0
    some = [choice for choice in found[:simulated] if choice.cost.step_seconds <= close]
    if not alone and len({_pipeline(choice) for choice in some}) <= 1:
        some = []
    proposals = [
        _proposal(problem, choice, known if place < len(some) else None) for place, choice in enumerate(found)
    ]
    return sorted(proposals, key=_order)


def _pipeline(choice: Choice) -> object:
    """What makes a difference to its simulation: all but the sharding."""
    combination = choice.combination
    strategy = replace(combination.strategy, sharding=DEFAULT)
    return strategy, combination.sizes, choice.bounds, choice.recompute


def _order(each: Proposal) -> tuple[bool, float]:
    """Only what was simulated can be said to be better than what was simulated."""
    return not each.simulated, each.step_seconds


def missing(problem: Problem, space: Space, workers: int, limit: int | None) -> str:
    """What to say where nothing fits."""
    needed = leanest(problem, space, workers)
    assert limit is not None, "with memory in plenty every combination fits"
    return (
        f"no plan for {workers} worker{'s' * (workers > 1)} fits {in_words(limit)} of memory each: the "
        f"leanest needs {in_words(needed)}, {in_words(needed - limit)} more; give more memory or "
        "more workers, or make micro-batches smaller"
    )


def leanest(problem: Problem, space: Space, workers: int) -> int:
    """The least bytes of each worker within which some plan fits. Raises NothingFits if ``space`` has nothing
    for so many workers and layers."""
    possible = _possible(problem, space, workers)
    if not possible:
        raise NothingFits(
            "no schedule, number of chunks and sequence degree of these fits the workers and layers"
        )
    return CutSearch(problem, 0, space.recompute).leanest(possible)


def _possible(problem: Problem, space: Space, workers: int) -> list[Combination]:
    """The same ones each time."""
    if (space, workers) not in problem.known:
        each = combinations(space, workers, problem.layers, problem.micro_batches)
        problem.known[space, workers] = list(each)
    possible: list[Combination] = problem.known[space, workers]
    return possible


def in_words(count: int) -> str:
    """Bytes for a person: 3.2 GiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} bytes"


def _proposal(problem: Problem, choice: Choice, known: Simulated | None) -> Proposal:
    """Simulated, unless ``known`` is None: what was, already."""
    combination, cost = choice.combination, choice.cost
    strategy = combination.recomputing(choice.recompute)
    seconds, bubble = cost.step_seconds, cost.bubble
    if known is not None:
        pipeline = _pipeline(choice)
        if pipeline not in known:
            known[pipeline] = _pipelines(problem, choice)
        simulated, closed = known[pipeline]
        seconds += simulated - closed
        bubble = 1.0 - (1.0 - bubble) * cost.step_seconds / seconds
    return Proposal(
        strategy, choice.bounds, combination.sizes, seconds, cost.memory_bytes, bubble, known is not None
    )


def _pipelines(problem: Problem, choice: Choice) -> tuple[float, float]:
    """Seconds of the pipeline alone, simulated and by the cost model. Of a large step a smaller one is
    simulated, with fewer micro-batches and as many times fewer workers, and scaled."""
    combination, strategy = choice.combination, choice.combination.strategy
    problem = problem.of(combination)
    free = replace(problem.costs, link_bytes_per_second=math.inf, link_seconds_per_message=0.0)
    problem = replace(problem, costs=free)
    closed = evaluate(problem, combination, choice.bounds, choice.recompute).step_seconds
    teams = [size // strategy.sequence for size in combination.sizes]
    tasks = (2 + FORMULAS[strategy.schedule].splits) * combination.stages * problem.micro_batches
    scale = min(-(-tasks // LARGEST_SIMULATION), *teams, problem.micro_batches)
    alone = replace(strategy, sequence=1, offload=None)
    smaller = Combination(alone, tuple(max(round(each / scale), 1) for each in teams))
    micro_batches = max(round(problem.micro_batches * sum(smaller.sizes) / sum(teams)), 1)
    if tasks > scale * LARGEST_SIMULATION:  # no fewer workers, so fewer rounds, but enough to fill and drain
        groups = len(teams)
        rounds = round(micro_batches * scale * LARGEST_SIMULATION / tasks / groups)
        micro_batches = min(micro_batches, max(rounds, 2) * groups)
    little = replace(problem, micro_batches=micro_batches)
    again = frozenset(choice.recompute)
    seconds = []
    for first, stop in pairwise(choice.bounds):
        forward, inputs, weights = stage_seconds(little, smaller, first, stop)
        extra = sum(little.again[layer] for layer in again & {*range(first, stop)})
        seconds.append(StageSeconds(forward, inputs + extra / little.speed, weights))
    speeds = tuple((1.0,) * size for size in smaller.sizes)
    simulated = pipeline_seconds(strategy, choice.bounds, speeds, little.micro_batches, seconds)
    reference = evaluate(little, smaller, choice.bounds, choice.recompute).step_seconds
    return closed * simulated / reference, closed
