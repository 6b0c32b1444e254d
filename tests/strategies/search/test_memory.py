"""What the search takes a sharding to cost is what the theory of shardings says."""

from __future__ import annotations

import pytest

from strategies.search.cost import widest
from strategies.search.memory import SHARDINGS
from strategies.shardings import registry
from strategies.shardings.theory import resident_bytes, sent_bytes
from tests.support.parts import even_part

LAYERS = [640, 1280, 1920, 640]


def test_every_sharding_has_a_cost() -> None:
    assert set(SHARDINGS) == set(registry.SHARDINGS)


@pytest.mark.parametrize("name", SHARDINGS)
@pytest.mark.parametrize("workers", [1, 2, 4, 5])
def test_bytes_are_those_of_the_theory(name: str, workers: int) -> None:
    part = even_part(LAYERS, workers, 3, alone=workers == 1)
    theory, cost = resident_bytes(name, part), SHARDINGS[name]
    parameters = sum(LAYERS)
    assert cost.device_bytes(parameters, widest(LAYERS), workers) == theory.parameters + theory.sums
    assert cost.host_bytes(parameters, workers, backed_up=workers > 1) == theory.shards + theory.backups
    for splits in (False, True):
        sent = sent_bytes(name, part, split_backward=splits)
        expected = sent.reduce + sent.gather + sent.fetch
        assert cost.sent_bytes(parameters, workers, 3, splits=splits) == pytest.approx(expected)
