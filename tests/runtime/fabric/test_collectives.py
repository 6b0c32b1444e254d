"""Collectives against plain sums and concatenations, for groups that change without ceremony."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from runtime.fabric.collectives import all_reduce, exchange
from runtime.fabric.interface import Endpoint, Interrupted, Tag

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
