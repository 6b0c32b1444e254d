"""The searched strategy beside every uniform one: what was predicted of each, and what a real run takes.

Real Ray actors; only the layers' compute is emulated by sleeping (``emulated``). Each strategy is a run of
its own, in which nothing is searched for. The search is asked three times, the last two with memory for which
one stage, and one or two stages, take too much. Beside it stands how long the search itself takes for 64
workers, at the start and after a loss, also where it may choose among all shardings and sequence degrees.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from actors.cluster import connect
from jobs.assembly import assemble
from jobs.bench.activations import read_peak
from jobs.bench.report import BenchReport
from jobs.bench.schedules import measure
from jobs.bench.sleeping import recipe_of
from jobs.plan import measured_costs
from jobs.recipe.recipe import Recipe
from runtime.layout import ALIGNMENT, Block, Layout
from runtime.plan import Member, Plan
from strategies.planning.costs import CostModel
from strategies.search.cost import Problem
from strategies.search.memory import SHARDINGS
from strategies.search.planning import searched_plan
from strategies.search.search import Proposal, in_words, search
from strategies.search.space import Space
from strategies.sequence.sharing import Sharing

GOAL = 0.95
PLANNING_GOAL = 0.05
"""Seconds for 64 workers and ``PLANNING_LAYERS`` equal layers."""

WORKERS, LAYERS, MICRO_BATCHES = 4, 8, 8
FORWARD_SECONDS = 0.02
"""Per layer: so long that messages and sums, some milliseconds a micro-batch, are little beside it."""

LINK_BYTES_PER_SECOND = 1e9
WIDTH = 4096
"""Of a layer: one parameter a column, so that memory is something that strategies differ in."""

SIMULATED = 4
STEPS = 2
"""Over how many steps a run's pass is measured. Its first is left out: it probes the gradients' scale."""

REPEATS = 9
PLANNING_LAYERS, PLANNING_WORKERS = 32, 64
"""The depth of a Llama of 7 billion parameters."""

DEEP_LAYERS, SLICES = 96, 8


@dataclass(frozen=True, slots=True)
class Measured:
    """A strategy as it was predicted and as it ran. Seconds are of the pass of forwards and backwards of one
    step, ``memory_bytes`` those of the fullest worker, received messages left out."""

    proposal: Proposal
    seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Case:
    """What the search takes within ``limit`` bytes (None: plenty)."""

    limit: int | None
    chosen: Proposal

    def share(self, results: Sequence[Measured]) -> float:
        """The fastest uniform strategy that fits, measured, over the chosen one, measured."""
        fitting = [m for m in results if self.limit is None or m.proposal.memory_bytes <= self.limit]
        best = min(m.seconds for m in fitting if is_uniform(m.proposal))
        return best / next(m.seconds for m in results if same(m.proposal, self.chosen))


def is_uniform(proposal: Proposal) -> bool:
    """Whether all groups have as many workers, all stages as many layers, and all or no layers are
    recomputed."""
    lengths = {stop - first for first, stop in pairwise(proposal.bounds)}
    again = len(proposal.strategy.recompute)
    return len(lengths) == len(set(proposal.sizes)) == 1 and again in (0, LAYERS)


def same(one: Proposal, other: Proposal) -> bool:
    return (one.strategy, one.sizes, one.bounds) == (other.strategy, other.sizes, other.bounds)


def proposals(costs: CostModel) -> tuple[list[Case], list[Proposal]]:
    """(what the search takes, every uniform strategy without recomputation and what the search takes)."""
    problem = Problem(costs, MICRO_BATCHES)
    every = search(problem, Space(recompute=()), WORKERS, None, most=1000, simulated=1000)
    uniform = [each for each in every if is_uniform(each)]
    limits = [None, *(min(p.memory_bytes for p in uniform if len(p.sizes) == k) - 1 for k in (1, 2))]
    chosen = [search(problem, Space(), WORKERS, limit, simulated=SIMULATED)[0] for limit in limits]
    runs = list(uniform)
    for each in chosen:
        if not any(same(each, other) for other in runs):
            runs.append(each)
    return [Case(limit, each) for limit, each in zip(limits, chosen, strict=True)], runs


def recipe(proposal: Proposal | None = None, peaks: Path | None = None) -> Recipe:
    """A run of that strategy (None: whichever). It would go on for longer than the bench lasts. ``peaks``: a
    folder in which its workers note the most that activations take."""
    name = "planner"
    parallel: dict[str, Any] = {
        "workers": WORKERS,
        "micro_batches": MICRO_BATCHES,
        "cpus_per_worker": 0.0,
    }
    recompute: list[int] = []
    if proposal is not None:
        strategy, stages = proposal.strategy, len(proposal.sizes)
        chosen = {"stages": stages, "schedule": strategy.schedule, "chunks": strategy.chunks}
        parallel |= {**chosen, "rebalance": False}
        name, recompute = f"planner-{strategy.schedule}-{strategy.chunks}-{stages}", [*strategy.recompute]
    plain = recipe_of(name, parallel, layers=LAYERS, forward_seconds=FORWARD_SECONDS, width=WIDTH)
    given = plain.model_dump() | {"precision": {"recompute": recompute or "none"}}
    given["data"]["arguments"] = {"width": WIDTH}
    if peaks is not None:
        metered = {"of": given["model"]["build"], "folder": str(peaks), **given["model"]["arguments"]}
        given["model"] = {"build": "jobs.bench.activations:build", "arguments": metered}
    return Recipe.model_validate(given)


@dataclass(frozen=True, slots=True)
class Planning:
    """How long the search takes: the fastest of some repeats, as in ``bench planning``. ``promised``: for a
    model as the goal names it, not a deeper one nor one whose layers differ."""

    case: str
    seconds: float
    strategy: str
    stages: int
    promised: bool = True


def planning() -> list[Planning]:
    """For 64 workers: at the start and after losses, with memory in plenty, so scarce that layers are
    recomputed, so scarce that little fits, and so scarce that nothing does any more; for one sharding and for
    all, for one sequence degree and for all. Beside them two of the slower cases of each of two other models.
    Who is lost had a part in the best plan for 64 within the same memory, or where nothing fits within the
    least of the others."""
    one, every = Space(), Space(shardings=tuple(SHARDINGS))
    plain, deep, unlike = _model(PLANNING_LAYERS), _model(DEEP_LAYERS), _model(PLANNING_LAYERS, ends=True)
    cases: dict[str, Callable[[], Plan]] = {}
    for degrees, sequences in (("", (1,)), (", all sequence degrees", tuple(range(1, SLICES + 1)))):
        for name, space, limits in (
            (f"one sharding{degrees}", one, (None, 1_000_000_000)),
            (f"all shardings{degrees}", every, (None, 2_000_000_000, 1_000_000_000, 500_000_000)),
        ):
            cases |= _cases(name, plain, replace(space, sequences=sequences), limits, 250_000_000)
    promised = set(cases)
    cases |= _cases(f"{DEEP_LAYERS} layers, all shardings", deep, every, (None, 3_000_000_000))
    cases |= _cases("an embedding and a head, all shardings", unlike, every, (None, 1_000_000_000))
    fastest = dict.fromkeys(cases, math.inf)
    plans: dict[str, Plan] = {}
    for _ in range(REPEATS):  # each case's apart, as the machine is slower at times
        for case, planned in cases.items():
            began = time.perf_counter()
            plans[case] = planned()
            fastest[case] = min(fastest[case], time.perf_counter() - began)
    return [_planned(case, fastest[case], plan, case in promised) for case, plan in plans.items()]


def _model(layers: int, *, ends: bool = False) -> tuple[Layout, CostModel]:
    """Of equal layers, or beside those an embedding, which computes nothing and keeps little, and a head."""
    blocks = tuple(Block(i, f"layer{i}", (i,), (), ALIGNMENT * 100_000) for i in range(layers))
    layout = Layout(layers, blocks, ())
    costs = replace(
        CostModel.unmeasured(layout),
        link_bytes_per_second=50e9,
        boundary_bytes=(1 << 22,) * layers,
        kept_bytes=(1 << 26,) * layers,
        sharing=(Sharing(heads=32, head_share=0.25, exchanges=4, exchanged_bytes=4 << 22),) * layers,
        slices=SLICES,
    )
    if ends:
        seconds = (1 / 1024, *costs.forward_seconds[2:], 7 / 1024)
        kept = (1 << 23, *costs.kept_bytes[2:], 1 << 27)
        backward = tuple(2 * each for each in seconds)
        costs = replace(costs, forward_seconds=seconds, backward_seconds=backward, kept_bytes=kept)
    return layout, costs


def _cases(
    name: str,
    model: tuple[Layout, CostModel],
    space: Space,
    limits: Sequence[int | None],
    nothing: int | None = None,
) -> dict[str, Callable[[], Plan]]:
    """A first plan and two after losses within each of ``limits``, and one within ``nothing``, which does not
    suffice."""
    layout, costs = model
    members = [Member(worker, f"node{worker // 8}") for worker in range(PLANNING_WORKERS)]
    cases: dict[str, Callable[[], Plan]] = {}
    for limit in (*limits, *([nothing] if nothing else ())):
        within = replace(costs, worker_memory_bytes=limit)
        memory = "plenty" if limit is None else in_words(limit)
        about = layout, within, 4 * PLANNING_WORKERS, space
        fewer = {"a worker lost, nothing fits": members[1:]}
        if limit in limits:
            first = searched_plan(0, members, *about)
            cases[f"{name}, first plan, memory {memory}"] = partial(searched_plan, 0, members, *about)
            fewer = {"a worker lost": members[1:], "a third lost": members[PLANNING_WORKERS // 3 :]}
        for lost, present in fewer.items():
            cases[f"{name}, {lost}, memory {memory}"] = partial(searched_plan, 1, present, *about, first)
    return cases


def _planned(case: str, seconds: float, plan: Plan, promised: bool) -> Planning:
    assert plan.strategy is not None, "a searched plan has a strategy"
    strategy = plan.strategy
    again = f", {len(strategy.recompute)} recomputed" if strategy.recompute else ""
    teams = f", teams of {strategy.sequence}" if strategy.sequence > 1 else ""
    words = f"{strategy.schedule}, {strategy.sharding}{teams}{again}"
    return Planning(case, seconds, words, len(plan.groups), promised)


def report(results: Sequence[Measured], cases: Sequence[Case], plannings: Sequence[Planning]) -> BenchReport:
    """The table: one row a strategy, the fastest first."""
    shares = [case.share(results) for case in cases]
    slowest = max(each.seconds for each in plannings if each.promised)
    names = {case.limit: "all" if case.limit is None else in_words(case.limit) for case in cases}
    return BenchReport(
        bench="planner",
        headline={
            "share_of_best_uniform": min(shares),
            "seconds_at_64": slowest,
            "worst_prediction": max(abs(m.seconds / m.proposal.step_seconds - 1) for m in results),
            "worst_memory": max(abs(m.memory_bytes / m.proposal.memory_bytes - 1) for m in results),
        },
        goal=f"share_of_best_uniform >= {GOAL}, seconds_at_64 <= {PLANNING_GOAL}",
        met=min(shares) >= GOAL and slowest <= PLANNING_GOAL,
        rows=tuple(
            {
                "schedule": each.proposal.strategy.schedule,
                "chunks": each.proposal.strategy.chunks,
                "stages": len(each.proposal.sizes),
                "recomputed": len(each.proposal.strategy.recompute),
                "predicted_seconds": each.proposal.step_seconds,
                "measured_seconds": each.seconds,
                "deviation": each.seconds / each.proposal.step_seconds - 1,
                "bubble": each.proposal.bubble,
                "predicted_memory": in_words(each.proposal.memory_bytes),
                "measured_memory": in_words(each.memory_bytes),
                "chosen_with": ", ".join(
                    names[case.limit] for case in cases if same(case.chosen, each.proposal)
                ),
            }
            for each in sorted(results, key=lambda each: each.seconds)
        ),
        notes=(
            "the layers' compute is emulated: a layer sleeps in forward, as long for its input's gradient "
            "and as long for its weights'; actors, messages and sums are real",
            f"{LAYERS} equal layers on {WORKERS} workers, {MICRO_BATCHES} micro-batches; every number of "
            "stages that divides the workers with every schedule; seconds are those of a step's pass; "
            "predictions rest on a profile; measured memory is that of the fullest worker's parameters, "
            "sums, shards and backups, and the most that layers kept at once",
            *(
                f"the fastest uniform strategy over the chosen one, memory {names[case.limit]}: {share:.3f}"
                for case, share in zip(cases, shares, strict=True)
            ),
            *(
                f"search for {PLANNING_WORKERS} workers, {each.case}{'' if each.promised else ' (no goal)'}: "
                f"{each.seconds:.3f} s, {each.strategy} in {each.stages} stages"
                for each in plannings
            ),
        ),
    )


def run(console: Console) -> BenchReport:
    """Measures; takes about three minutes. Raises RuntimeError if a run ends by itself."""
    plannings = planning()
    with tempfile.TemporaryDirectory() as folder:
        job = assemble(recipe(), folder)
        cases, runs = proposals(measured_costs(job, torch.device("cpu"), LINK_BYTES_PER_SECOND))
        results = []
        with connect(None, WORKERS, 1.0, 0.0):
            for number, each in enumerate(runs):
                peaks = Path(folder) / f"peaks-{number}"
                found = measure(recipe(each, peaks), Path(folder) / f"{number}", steps=STEPS)
                memory = max(
                    resident + read_peak(peaks, found.processes[worker])
                    for worker, resident in found.resident_bytes.items()
                )
                results.append(Measured(each, found.seconds, memory))
                console.print(
                    f"{each.strategy.schedule}, {len(each.sizes)} stages: {results[-1].seconds:.3f} s, "
                    f"predicted {each.step_seconds:.3f} s; {in_words(memory)}, predicted "
                    f"{in_words(each.memory_bytes)}",
                    highlight=False,
                )
    return report(results, cases, plannings)
