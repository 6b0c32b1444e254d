"""What one choice costs: seconds of a step in closed form, bytes of every stage, exactly and one at a time.

A step takes sum(fill + crossing) + max(load - fill + synchronising) over stages: the fill and drain that
every stage adds (``formulas``), one micro-batch over every boundary and back, and of the slowest stage
what its busiest worker's micro-batches take beyond that, and then its gradients and parameters.
The dynamic programme (``dynamic``) minimises just this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from runtime.plan import Strategy
from strategies.planning.costs import BYTES_PER_PARAMETER, CostModel
from strategies.search.formulas import FORMULAS, Formula, Held, in_flight_by_layers
from strategies.search.memory import SHARDINGS
from strategies.search.space import Combination
from strategies.search.teams import PLAIN, Form, costs_in_form, form_of
from strategies.shardings.theory import PARAMETER


@dataclass(frozen=True, slots=True)
class StageCost:
    """Of one stage: seconds it adds to all others' and beyond, and the bytes of each of its workers."""

    added: float
    beyond: float
    memory_bytes: int
    busy: float
    """Seconds for which all of its workers compute, together."""


@dataclass(frozen=True)
class Problem:
    """Measured costs, the step's micro-batches and the workers' mean speed, summed up once for all.

    ``form``: the costs are those of teams, or of workers whose parameters are offloaded (``of``); ``again``:
    then each layer's forward where it is computed again, for which nothing is sent or fetched.
    """

    costs: CostModel
    micro_batches: int
    speed: float = 1.0
    form: Form | None = None
    again: tuple[float, ...] = ()
    forward: list[float] = field(init=False)
    split: tuple[list[float], list[float]] = field(init=False)
    whole: tuple[list[float], list[float]] = field(init=False)
    layer_parameters: list[int] = field(init=False)
    parameters: list[int] = field(init=False)
    kept: list[int] = field(init=False)
    saved: tuple[int, ...] = field(init=False)
    """Bytes per micro-batch that a layer does not keep where it is computed again."""
    least_crossing: float = field(init=False)
    """Seconds in which a micro-batch passes the boundary where that is fastest, and back."""
    fills: dict[tuple[str, int], float] = field(init=False, default_factory=dict, compare=False, repr=False)
    forms: dict[Form, Problem] = field(init=False, default_factory=dict, compare=False, repr=False)
    known: dict[Any, Any] = field(init=False, default_factory=dict, compare=False, repr=False)
    """What others have worked out of it, once."""

    def __post_init__(self) -> None:
        costs, layers = self.costs, self.layers
        halves = tuple((each / 2, each / 2) for each in costs.backward_seconds)
        split = costs.split_seconds or halves
        boundary = costs.boundary_bytes or (0,) * layers
        kept = costs.kept_bytes or (0,) * layers
        set_ = object.__setattr__  # frozen: what follows is made of the fields, once
        set_(self, "forward", list(accumulate(costs.forward_seconds, initial=0.0)))
        set_(self, "whole", tuple(list(accumulate(each, initial=0.0)) for each in zip(*halves, strict=True)))
        set_(self, "split", tuple(list(accumulate(each, initial=0.0)) for each in zip(*split, strict=True)))
        set_(self, "layer_parameters", [each // BYTES_PER_PARAMETER for each in costs.parameter_bytes])
        set_(self, "parameters", list(accumulate(self.layer_parameters, initial=0)))
        set_(self, "kept", list(accumulate(kept, initial=0)))
        saved = (max(all_ - output, 0) for all_, output in zip(kept, boundary, strict=True))
        set_(self, "saved", tuple(saved))
        set_(self, "again", self.again or costs.forward_seconds)
        crossings = (self.crossing_seconds(first) for first in range(1, layers))
        set_(self, "least_crossing", min(crossings, default=0.0))

    @property
    def layers(self) -> int:
        return len(self.costs.forward_seconds)

    def of(self, combination: Combination) -> Problem:
        """As it is for the combination's teams and for where its parameters are. All others ask this one."""
        if self.form is not None:
            return self
        form = form_of(combination.strategy)
        if form == PLAIN:
            return self
        if form not in self.forms:
            costs, again = costs_in_form(self.costs, form, self.speed)
            self.forms[form] = Problem(costs, self.micro_batches, self.speed, form, again)
        return self.forms[form]

    def input_bytes(self, first: int) -> int:
        """What the layer ``first`` takes in, of one micro-batch."""
        if first == 0:
            return self.costs.entry_bytes
        return self.costs.boundary_bytes[first - 1] if self.costs.boundary_bytes else 0

    def crossing_seconds(self, first: int) -> float:
        """One micro-batch over the boundary before ``first`` and back."""
        if not first:
            return 0.0
        costs = self.costs
        bytes_ = self.input_bytes(first)
        return float(2 * (bytes_ / costs.link_bytes_per_second + costs.link_seconds_per_message))

    def rounds(self, combination: Combination, size: Any) -> Any:
        """How many micro-batches the busiest team of a group of ``size`` workers (or an array) computes."""
        return -(-self.micro_batches // (size // combination.strategy.sequence))

    def held(self, combination: Combination, stage: int, layers: Any, first_layers: Any) -> Any:
        """Chunks x micro-batches in flight on a worker of a stage's group, if that holds so many layers (or
        an array of them)."""
        strategy, k = combination.strategy, stage % len(combination.sizes)
        rounds = self.rounds(combination, combination.sizes[k])
        what = Held(combination.sizes, k, layers, first_layers, self.layers, rounds, strategy.chunks)
        return FORMULAS[strategy.schedule].in_flight(what)

    def held_by_layers(
        self, combination: Combination, first_layers: int
    ) -> tuple[tuple[Any, int | bytes], ...]:
        """Of every group (``held`` for every number of layers, or one number for all, a key of it), if the
        first stage has ``first_layers``."""
        strategy, sizes = combination.strategy, combination.sizes
        rounds = {size: self.rounds(combination, size) for size in {*sizes}}
        first = first_layers if FORMULAS[strategy.schedule].by_first_stage else 1
        rounds_of = tuple(rounds[size] for size in sizes)
        return in_flight_by_layers(strategy.schedule, strategy.chunks, sizes, rounds_of, first, self.layers)

    def timed_stage(
        self, combination: Combination, bounds: Sequence[int], k: int, again: Sequence[int]
    ) -> tuple[float, float, float]:
        """(seconds added, seconds beyond, seconds of one micro-batch) of stage ``k`` of the layers cut at
        ``bounds``, of which it computes ``again``."""
        strategy = combination.strategy
        first, stop = bounds[k], bounds[k + 1]
        seconds = stage_seconds(self, combination, first, stop)
        extra = sum(self.again[layer] for layer in again) / self.speed
        size = combination.size(k)
        rounds = self.rounds(combination, size)
        added, beyond, each = timed(FORMULAS[strategy.schedule], strategy.chunks, rounds, seconds, extra)
        parameters = strategy.chunks * (self.parameters[stop] - self.parameters[first])
        sent = self.sent_bytes(combination, size, parameters)
        added += self.crossing_seconds(first)
        return added, beyond + sent / self.costs.link_bytes_per_second, each

    def stage(
        self, combination: Combination, bounds: Sequence[int], k: int, recompute: frozenset[int]
    ) -> StageCost:
        """Stage ``k`` of the layers cut at ``bounds``."""
        strategy = combination.strategy
        first, stop = bounds[k], bounds[k + 1]
        again = [layer for layer in range(first, stop) if layer in recompute]
        added, beyond, each = self.timed_stage(combination, bounds, k, again)
        parameters = strategy.chunks * (self.parameters[stop] - self.parameters[first])
        kept = self.kept[stop] - self.kept[first] + self.input_bytes(first)
        kept -= sum(self.saved[layer] for layer in again)
        held = int(self.held(combination, k, stop - first, bounds[1]))
        working = max(self.saved[first:stop]) if again else 0
        most = widest(self.layer_parameters[first:stop], streamed_layers(strategy))
        memory = self.resident(combination, combination.size(k), parameters, most)
        memory += held * kept + working
        return StageCost(added, beyond, memory, each * self.micro_batches * strategy.sequence)

    def sent_bytes(self, combination: Combination, size: Any, parameters: Any) -> Any:
        """What a worker sends in a step, of a group of ``size`` workers that holds so many parameters (or
        arrays)."""
        strategy, splits = combination.strategy, FORMULAS[combination.strategy.schedule].splits
        sharding, rounds = SHARDINGS[strategy.sharding], self.rounds(combination, size)
        return sharding.sent_bytes(parameters, size, rounds, splits=splits)

    def resident(self, combination: Combination, size: Any, parameters: Any, widest: Any) -> Any:
        """A worker's bytes beside activations, of a group of ``size`` workers that holds so many parameters,
        ``widest`` in ``streamed_layers`` consecutive layers (or arrays)."""
        sharding = SHARDINGS[combination.strategy.sharding]
        if combination.strategy.offload is not None:
            bytes_ = PARAMETER * widest
            if not self.costs.host_state:  # what is at home and its window are in one memory
                bytes_ = bytes_ + sharding.device_bytes(parameters, parameters, size)
        else:
            bytes_ = sharding.device_bytes(parameters, widest, size)
        if not self.costs.host_state:
            bytes_ = bytes_ + sharding.host_bytes(parameters, size, backed_up=sum(combination.sizes) > 1)
        return bytes_

    def split_fill(self, combination: Combination) -> float:
        """What all layers add to fill and drain if each is a stage by itself: no stages together add more."""
        inputs, weights = self.split
        schedule, chunks = combination.strategy.schedule, combination.strategy.chunks
        if (schedule, chunks) in self.fills:
            return self.fills[schedule, chunks]
        fill = FORMULAS[schedule].fill
        before = zip(self.forward, inputs, weights, strict=True)
        fills = (fill(f - a, i - b, w - c, chunks) for (a, b, c), (f, i, w) in pairwise(before))
        self.fills[schedule, chunks] = float(sum(fills)) / self.speed
        return self.fills[schedule, chunks]


def stage_seconds(
    problem: Problem, combination: Combination, first: int, stop: int
) -> tuple[float, float, float]:
    """(forward, input gradient, weight gradient) of one micro-batch, nothing recomputed, by one team; of a
    ``problem`` that is that ``of`` the combination."""
    inputs, weights = problem.split if FORMULAS[combination.strategy.schedule].splits else problem.whole
    pace = problem.speed
    return (
        (problem.forward[stop] - problem.forward[first]) / pace,
        (inputs[stop] - inputs[first]) / pace,
        (weights[stop] - weights[first]) / pace,
    )


def streamed_layers(strategy: Strategy) -> int:
    """Of how many consecutive layers a worker has parameters, where it does not have all."""
    return 2 if strategy.offload is None else sum(strategy.offload)


def widest(parameters: Sequence[int], layers: int = 2) -> int:
    """The most in so many consecutive layers."""
    return max(
        sum(parameters[first : first + layers]) for first in range(max(len(parameters) - layers, 0) + 1)
    )


def timed(
    formula: Formula, chunks: Any, rounds: Any, seconds: tuple[Any, Any, Any], extra: Any
) -> tuple[Any, Any, Any]:
    """(fill, what its group's micro-batches take beyond that, seconds of one micro-batch) of a stage whose
    input gradients take ``extra`` seconds for what is recomputed; arrays for many stages at once."""
    forward, inputs, weights = seconds
    fill = formula.fill(forward, inputs + extra, weights, chunks)
    each = forward + inputs + weights + extra
    return fill, chunks * (rounds * each - fill), each


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a whole choice costs; ``memory_bytes`` of its fullest worker; ``bubble`` is the share of all
    workers' time in a step in which they do not compute."""

    step_seconds: float
    memory_bytes: int
    bubble: float


def evaluate(
    problem: Problem, combination: Combination, bounds: Sequence[int], recompute: Sequence[int]
) -> Evaluation:
    """The step that the dynamic programme minimises and a brute force would compare."""
    again, problem = frozenset(recompute), problem.of(combination)
    stages = [problem.stage(combination, bounds, k, again) for k in range(combination.stages)]
    seconds = _folded((each.added, each.beyond) for each in stages)
    busy = sum(each.busy for each in stages)
    return Evaluation(
        seconds,
        max(each.memory_bytes for each in stages),
        1.0 - busy / (sum(combination.sizes) * seconds),
    )


def step_seconds(
    problem: Problem, combination: Combination, bounds: Sequence[int], recompute: Sequence[int]
) -> float:
    """Those of ``evaluate``, in less time."""
    problem = problem.of(combination)
    again = [[layer for layer in recompute if first <= layer < stop] for first, stop in pairwise(bounds)]
    return _folded(problem.timed_stage(combination, bounds, k, each)[:2] for k, each in enumerate(again))


def _folded(stages: Iterable[tuple[float, float]]) -> float:
    """Seconds of a step whose stages add so much and take so much beyond."""
    added, beyond = zip(*stages, strict=True)
    return float(sum(added) + max(beyond))
