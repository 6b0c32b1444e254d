"""Collectives against plain sums and concatenations, for groups that change without ceremony."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.fabric.collectives import all_gather, all_reduce, exchange, reduce_scatter
from runtime.fabric.inprocess import InProcessFabric
from runtime.fabric.interface import Endpoint, Interrupted, Tag
from runtime.plan import Shard

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

WAIT = 30


def on_each(network: Any, group: Sequence[int], work: Callable[[Endpoint], Any]) -> dict[int, Any]:
    futures = {w: network.run(lambda w=w: work(network.endpoints[w])) for w in group}
    return {w: future.result(WAIT) for w, future in futures.items()}


@pytest.mark.parametrize("group", [(4,), (5, 0, 3), tuple(range(8)), tuple(range(11))])
def test_exchange_and_all_reduce(network: Any, group: tuple[int, ...]) -> None:
    for worker in group:
        network.add(worker)
    notes = on_each(network, group, lambda e: exchange(e, group, Tag(0, 0, 0, "notes"), {"from": e.worker}))
    assert all(list(n) == sorted(group) and n == {w: {"from": w} for w in group} for n in notes.values())

    def reduce(endpoint: Endpoint) -> torch.Tensor:
        tensor = torch.tensor([[0.1 * 3**endpoint.worker, 1e8 * (-1) ** endpoint.worker]])
        all_reduce(endpoint, group, Tag(0, 0, 0, "sum"), tensor)
        return tensor

    expected = torch.zeros(1, 2)
    for worker in sorted(group):
        expected += torch.tensor([[0.1 * 3**worker, 1e8 * (-1) ** worker]])
    assert all(torch.equal(t, expected) for t in on_each(network, group, reduce).values())


def cut(block: int, size: int, owners: Sequence[int]) -> list[Shard]:
    """Unequal slices, one per owner; the first owner has another, the last."""
    edges = sorted({0, size, *(size * (k + 1) ** 2 // (len(owners) + 1) ** 2 for k in range(len(owners)))})
    return [
        Shard(block, start, stop, owners[k % len(owners)], None)
        for k, (start, stop) in enumerate(pairwise(edges))
    ]


@pytest.mark.parametrize("ordered", [False, True])
def test_reduce_scatter_then_all_gather(network: Any, ordered: bool) -> None:
    members = {0: (0, 1, 2), 1: (1, 2, 3, 4), 2: (0, 1, 2, 3, 4), 3: (4,)}
    sizes = {0: 1000, 1: 64, 2: 70_000, 3: 128}
    shards = [shard for block, size in sizes.items() for shard in cut(block, size, members[block])]
    dtype = torch.float32 if ordered else torch.float64
    generator = torch.Generator().manual_seed(1)

    def random(size: int) -> torch.Tensor:
        if ordered:
            return torch.randn(size, generator=generator) * 1e3
        return torch.randint(-(2**40), 2**40, (size,), generator=generator).double()  # exact sums

    terms = {(b, w): random(sizes[b]) for b in sizes for w in members[b]}
    expected = {}
    for block in sizes:
        total = terms[block, members[block][0]].clone()
        for worker in members[block][1:]:
            total += terms[block, worker]
        expected[block] = total
    for worker in range(5):
        network.add(worker)

    def work(endpoint: Endpoint) -> dict[int, torch.Tensor]:
        held = {b: terms[b, endpoint.worker].clone() for b in sizes if endpoint.worker in members[b]}
        reduce_scatter(endpoint, Tag(0, 7, 0, "reduce"), held, shards, members, ordered=ordered)
        for shard in shards:
            if shard.owner != endpoint.worker and shard.block in held:
                own = terms[shard.block, endpoint.worker]
                rest = slice(shard.start, shard.stop)
                assert torch.equal(held[shard.block][rest], own[rest])
        all_gather(endpoint, Tag(0, 7, 0, "gather"), held, shards, members)
        return held

    for worker, held in on_each(network, range(5), work).items():
        assert set(held) == {b for b in sizes if worker in members[b]}
        for block, tensor in held.items():
            assert tensor.dtype == dtype and torch.equal(tensor, expected[block])
    assert all(e.statistics()["inbox_bytes"] == 0 for e in network.endpoints.values())


def test_a_group_is_edited_while_its_members_wait(network: Any) -> None:
    for worker in range(5):
        network.add(worker)

    def work(endpoint: Endpoint) -> float:
        total = torch.ones(1)
        with pytest.raises(Interrupted):  # worker 2 never joins in
            all_reduce(endpoint, (0, 1, 2, 3, 4), Tag(0, 0, 0, "sum"), total)
        generation = endpoint.acknowledge()
        total.fill_(endpoint.worker)
        all_reduce(endpoint, (0, 1, 3, 4), Tag(generation, 0, 0, "sum"), total)
        return total.item()

    futures = [network.run(lambda w=w: work(network.endpoints[w])) for w in (0, 1, 3, 4)]
    for worker in (0, 1, 3, 4):
        network.endpoints[worker].interrupt(1, [2])
    assert [future.result(WAIT) for future in futures] == [8.0] * 4


@settings(max_examples=25, deadline=None)
@given(
    workers=st.integers(1, 4),
    edges=st.sets(st.integers(1, 99), max_size=6),
    owners=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    seed=st.integers(0, 2**31),
)
def test_sums_of_integers_do_not_depend_on_the_cut(
    workers: int, edges: set[int], owners: list[int], seed: int
) -> None:
    fabric = InProcessFabric()
    endpoints = [fabric.endpoint(worker) for worker in range(workers)]
    bounds = [0, *sorted(edges), 100]
    shards = [
        Shard(0, start, stop, owner % workers, None)
        for start, stop, owner in zip(bounds, bounds[1:], owners, strict=False)
    ]
    generator = torch.Generator().manual_seed(seed)
    terms = torch.randint(-(2**50), 2**50, (workers, 100), generator=generator).double()
    held = [{0: row.clone()} for row in terms]
    members = {0: tuple(range(workers))}

    def work(worker: int) -> None:
        reduce_scatter(endpoints[worker], Tag(0, 0, 0, "r"), held[worker], shards, members, ordered=False)
        all_gather(endpoints[worker], Tag(0, 0, 0, "g"), held[worker], shards, members)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    fabric.close()
    assert all(torch.equal(tensors[0], terms.sum(0)) for tensors in held)
