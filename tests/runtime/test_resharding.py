"""Transfers are disjoint, sufficient and honest: simulated on arrays of labels, element by element."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.change import boundary_transfers
from runtime.layout import ALIGNMENT, Block, Layout
from runtime.plan import Member, Plan
from runtime.resharding import (
    PIECES,
    Holding,
    Interval,
    Transfer,
    newest_complete_version,
    normalise,
    plan_transfers,
    subtract,
)
from strategies.planning.folding import folded, unfolded
from strategies.planning.planner import CostModel, choose_plan

INTERVALS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=5)
VERSION = 7


def elements(intervals: list[Interval]) -> set[int]:
    return {i for start, stop in intervals for i in range(start, stop)}


def assert_normal(intervals: list[Interval]) -> None:
    assert all(start < stop for start, stop in intervals)
    assert all(a[1] < b[0] for a, b in pairwise(intervals))


@given(INTERVALS, INTERVALS)
def test_interval_arithmetic_is_set_arithmetic(one: list[Interval], other: list[Interval]) -> None:
    for result, expected in (
        (normalise(one), elements(one)),
        (subtract(one, other), elements(one) - elements(other)),
    ):
        assert elements(result) == expected
        assert_normal(result)


LAYOUT_2 = Layout(2, (Block(0, "a", (0,), (), ALIGNMENT), Block(1, "b", (1,), (), 2 * ALIGNMENT)), ())


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(0, 1),
            st.sampled_from([0, 32, 64]),
            st.sampled_from([64, 128]),
            st.integers(1, 3),
        ),
        max_size=14,
    )
)
@settings(max_examples=200)
def test_the_newest_version_held_everywhere(rows: list[tuple[int, int, int, int, int]]) -> None:
    holdings: dict[int, list[Holding]] = defaultdict(list)
    for worker, block, start, stop, version in rows:
        holdings[worker].append(Holding(block, start, min(stop, LAYOUT_2.blocks[block].size), version))
    complete = [
        version
        for version in range(4)
        if all(
            any(
                h.block == block.index and h.version == version and h.start <= element < h.stop
                for held in holdings.values()
                for h in held
            )
            for block in LAYOUT_2.blocks
            for element in range(block.size)
        )
    ]
    assert newest_complete_version(LAYOUT_2, holdings) == (max(complete) if complete else None)


def holdings_of(plan: Plan, *versions: int) -> dict[int, list[Holding]]:
    held: dict[int, list[Holding]] = {worker: [] for worker in plan.workers}
    for shard in plan.shards:
        for worker in (shard.owner, shard.backup):
            if worker is not None:
                held[worker] += [Holding(shard.block, shard.start, shard.stop, v) for v in versions]
    return held


class Machine:
    """A worker's memory as labels: the version of every element, -1 where there is none."""

    def __init__(self, layout: Layout, held: list[Holding], working: dict[int, int]) -> None:
        self.state: dict[int, NDArray[np.int64]] = {b.index: np.full(b.size, -1) for b in layout.blocks}
        self.parameters = {b.index: np.full(b.size, working.get(b.index, -1)) for b in layout.blocks}
        for holding in held:
            if holding.version == VERSION:
                self.state[holding.block][holding.start : holding.stop] = VERSION


def check_transfers(
    layout: Layout, plan: Plan, held: dict[int, list[Holding]], working: dict[int, dict[int, int]]
) -> tuple[Transfer, ...]:
    transfers = plan_transfers(layout, plan, VERSION, held, working)
    assert transfers == plan_transfers(
        layout, plan, VERSION, dict(reversed(held.items())), dict(reversed(working.items()))
    )
    before = {
        w: Machine(layout, held.get(w, []), working.get(w, {})) for w in {*held, *working, *plan.workers}
    }
    after = {w: Machine(layout, held.get(w, []), working.get(w, {})) for w in before}
    received: dict[tuple[int, int, str], set[int]] = defaultdict(set)
    for t in transfers:
        assert t.source != t.target and t.start < t.stop
        source, span = before[t.source], slice(t.start, t.stop)
        has_state = bool((source.state[t.block][span] == VERSION).all())
        if t.what != "parameters":
            assert has_state, "state from someone who lacks it"
            assert (before[t.target].state[t.block][span] != VERSION).all(), "state that was there"
            assert (t.what == "moments") is (t.target in plan.holders(layout.blocks[t.block].layers))
            after[t.target].state[t.block][span] = VERSION
        else:
            mixed = np.maximum(source.state[t.block][span], source.parameters[t.block][span])
            assert has_state or (mixed == VERSION).all(), "parameters from someone who lacks them"
            after[t.target].parameters[t.block][span] = VERSION
        span_elements = set(range(t.start, t.stop))
        assert not received[t.target, t.block, t.what] & span_elements, "sent twice"
        received[t.target, t.block, t.what] |= span_elements
    for (target, index, what), elements in received.items():
        if what == "moments":  # their parameters must be there before them
            known = after[target].parameters[index] == VERSION
            known |= before[target].state[index] == VERSION
            assert known[sorted(elements)].all(), "moments without parameters"
    for shard in plan.shards:
        for worker in {shard.owner, shard.backup} - {None}:
            assert worker is not None
            assert (after[worker].state[shard.block][shard.start : shard.stop] == VERSION).all()
    for block in layout.blocks:
        for worker in plan.holders(block.layers):
            own = after[worker]
            known = before[worker].state[block.index] == VERSION
            assert (known | (own.parameters[block.index] == VERSION)).all(), "parameters missing"
    check_order(plan, transfers)
    return transfers


def check_order(plan: Plan, transfers: tuple[Transfer, ...]) -> None:
    def phase(t: Transfer) -> int:
        if t.what == "parameters":
            return 0
        owns = any(s.start <= t.start < s.stop and s.owner == t.target for s in plan.shards_of(t.block))
        return 1 if owns else 2

    phases = [phase(t) for t in transfers]
    assert phases == sorted(phases)


@st.composite
def histories(draw: st.DrawFn) -> tuple[Layout, Plan, Plan, list[int]]:
    """(layout, plan before, plan after, workers that were lost for good)."""
    layers = draw(st.integers(1, 5))
    units = draw(st.lists(st.integers(1, 7), min_size=layers, max_size=layers))
    blocks = [Block(i, f"layer{i}", (i,), (), units[i] * ALIGNMENT) for i in range(layers)]
    if layers > 1 and draw(st.booleans()):
        blocks.append(Block(layers, "tied", (0, layers - 1), (), 3 * ALIGNMENT))
    layout = Layout(layers, tuple(blocks), ())
    domains = draw(st.lists(st.sampled_from("abc"), min_size=2, max_size=7))
    members = [Member(i, domain) for i, domain in enumerate(domains)]
    costs = CostModel.unmeasured(layout)
    stages = st.integers(1, 4)
    chunks = draw(st.integers(1, 3))
    planned, _ = choose_plan(1, members, layout, costs, 4, draw(stages))
    old = unfolded(planned, chunks, layout, members, [1.0] * layers)
    several = len(set(domains)) > 1
    doomed = draw(st.sampled_from(sorted(set(domains)))) if several else None
    lost = (
        [m.worker for m in members if m.domain == doomed]
        if several
        else [draw(st.sampled_from(members)).worker]
    )
    if draw(st.booleans()):
        lost = []
    joined = [Member(50 + i, draw(st.sampled_from("abd"))) for i in range(draw(st.integers(0, 2)))]
    present = [m for m in members if m.worker not in lost] + joined
    drained = draw(st.sampled_from(present))
    if len(present) > 1 and draw(st.booleans()):
        present = [m for m in present if m != drained]
    planned, _ = choose_plan(
        2, present, layout, costs, 4, draw(stages), draw(st.sampled_from([folded(old), None]))
    )
    return layout, old, unfolded(planned, chunks, layout, present, [1.0] * layers), lost


@given(histories(), st.data())
@settings(max_examples=200)
def test_transfers_are_disjoint_sufficient_and_honest(
    history: tuple[Layout, Plan, Plan, list[int]], data: st.DataObject
) -> None:
    layout, old, new, lost = history
    held = {w: h for w, h in holdings_of(old, VERSION - 1, VERSION).items() if w not in lost}
    working: dict[int, dict[int, int]] = {}
    for worker in held:
        held_blocks = [b.index for b in layout.blocks if worker in old.holders(b.layers)]
        # Some were lost in mid-gather: their working copy is of an older step.
        working[worker] = {
            b: data.draw(st.sampled_from([VERSION, VERSION, VERSION - 1])) for b in held_blocks
        }
    assert newest_complete_version(layout, held) == VERSION
    check_transfers(layout, new, held, working)


@given(histories())
@settings(max_examples=50)
def test_losing_any_one_domain_leaves_a_complete_version(
    history: tuple[Layout, Plan, Plan, list[int]],
) -> None:
    layout, old, _, _ = history
    held = holdings_of(old, VERSION)
    for lost in old.workers:  # every worker a domain of its own is the weakest case of all
        rest = {w: h for w, h in held.items() if w != lost}
        assert newest_complete_version(layout, rest) == VERSION


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=8), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=100)
def test_losing_a_whole_domain_leaves_a_complete_version(
    domains: list[str], layers: int, stages: int
) -> None:
    domains = [*domains, "z"]
    layout = Layout(layers, tuple(Block(i, f"l{i}", (i,), (), 5 * ALIGNMENT) for i in range(layers)), ())
    members = [Member(i, domain) for i, domain in enumerate(domains)]
    plan, _ = choose_plan(0, members, layout, CostModel.unmeasured(layout), 4, stages)
    held = holdings_of(plan, VERSION)
    for domain in set(domains):
        rest = {w: h for w, h in held.items() if domains[w] != domain}
        assert newest_complete_version(layout, rest) == VERSION


@given(histories())
@settings(max_examples=100)
def test_at_a_boundary_parameters_come_from_those_who_have_updated_them(
    history: tuple[Layout, Plan, Plan, list[int]],
) -> None:
    layout, old, new, _ = history
    for transfer in boundary_transfers(layout, old, new):
        if transfer.what == "parameters":
            owned = [(s.start, s.stop) for s in old.shards_of(transfer.block) if s.owner == transfer.source]
            assert not subtract([(transfer.start, transfer.stop)], owned)


def test_nothing_moves_when_nothing_changed() -> None:
    layout = Layout(2, tuple(Block(i, f"l{i}", (i,), (), 4 * ALIGNMENT) for i in range(2)), ())
    members = [Member(i, "n") for i in range(4)]
    plan, _ = choose_plan(0, members, layout, CostModel.unmeasured(layout), 4, 2)
    working = {w: {plan.stage_of(w): VERSION} for w in plan.workers}
    assert plan_transfers(layout, plan, VERSION, holdings_of(plan, VERSION), working) == ()


def test_a_newcomer_is_served_by_several_sources() -> None:
    layout = Layout(1, (Block(0, "l", (0,), (), 64 * ALIGNMENT),), ())
    members = [Member(i, "n") for i in range(4)]
    costs = CostModel.unmeasured(layout)
    old, _ = choose_plan(0, members, layout, costs, 4, 1)
    new, _ = choose_plan(1, [*members, Member(4, "n")], layout, costs, 4, 1, old)
    working = {w: {0: VERSION} for w in old.workers}
    transfers = check_transfers(layout, new, holdings_of(old, VERSION), working)
    to_newcomer = [t for t in transfers if t.target == 4 and t.what == "parameters"]
    assert len({t.source for t in to_newcomer}) >= 2
    assert all(t.what == "moments" for t in transfers if t.target != 4)


@pytest.mark.parametrize("newcomers", [1, 8, 80])
def test_many_targets_get_few_pieces_from_all_sources(newcomers: int) -> None:
    layout = Layout(1, (Block(0, "l", (0,), (), 640 * ALIGNMENT),), ())
    members = [Member(i, f"n{i % 3}") for i in range(20)]
    costs = CostModel.unmeasured(layout)
    old, _ = choose_plan(0, members, layout, costs, 200, 1)
    joined = [Member(20 + i, f"n{i % 3}") for i in range(newcomers)]
    new, _ = choose_plan(1, [*members, *joined], layout, costs, 200, 1, old)
    working = {w: {0: VERSION} for w in old.workers}
    transfers = check_transfers(layout, new, holdings_of(old, VERSION), working)
    sent = [t for t in transfers if t.what == "parameters"]
    assert newcomers <= len(sent) <= max(PIECES, newcomers) + 3 * newcomers
    bytes_of = Counter({worker: 0 for worker in old.workers})
    for transfer in sent:
        bytes_of[transfer.source] += transfer.bytes
    assert max(bytes_of.values()) - min(bytes_of.values()) <= max(t.bytes for t in sent)
