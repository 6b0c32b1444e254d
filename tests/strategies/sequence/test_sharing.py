"""How a team divides a layer: what is found by running it, and the bytes of the exchange's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch
from torch import nn

from jobs.models.gpt import build
from strategies.sequence.timing import sharing_of
from tests.support.sequences import elements_sent

BATCH, TOKENS, WIDTH, HEADS = 2, 12, 24, 6


def ticking() -> Callable[[], float]:
    """A clock that a second passes on between any two looks at it."""
    ticks = count()
    return lambda: float(next(ticks) >= 0)


def test_a_block_has_its_attention_by_heads_and_exchanges_what_that_reads_and_writes() -> None:
    layers, _ = build(width=WIDTH, depth=1, heads=HEADS, context=TOKENS)
    found = sharing_of(layers[1], [torch.randn(BATCH, TOKENS, WIDTH)], ticking())
    assert found is not None
    assert (found.heads, found.exchanges) == (HEADS, 2)
    assert found.exchanged_bytes == 4 * BATCH * TOKENS * (3 + 1) * WIDTH
    assert found.head_share == 1 / 3  # one of its three phases, by that clock
    tokens = sharing_of(layers[0], [torch.zeros(BATCH, TOKENS, dtype=torch.int64)], ticking())
    assert tokens is not None and (tokens.heads, tokens.exchanges, tokens.exchanged_bytes) == (0, 0, 0)


@pytest.mark.parametrize(("team", "slices"), [(1, 4), (2, 4), (3, 4), (4, 6), (6, 6)])
def test_bytes_are_those_of_the_exchange(team: int, slices: int) -> None:
    layers, _ = build(width=WIDTH, depth=1, heads=HEADS, context=TOKENS)
    found = sharing_of(layers[1], [torch.randn(BATCH, TOKENS, WIDTH)], ticking())
    assert found is not None
    one = WIDTH // HEADS
    both = [
        forward + backward
        for forward, backward in zip(
            elements_sent(TOKENS, slices, HEADS, team, (3 * one, one)),
            elements_sent(TOKENS, slices, HEADS, team, (one, 3 * one)),
            strict=True,
        )
    ]
    assert 2 * found.sent_bytes(team, slices) == pytest.approx(4 * BATCH * max(both))


def test_a_layer_that_says_nothing_cannot_be_shared() -> None:
    assert sharing_of(nn.Linear(2, 2), [torch.zeros(1, 2, 2)], ticking()) is None
