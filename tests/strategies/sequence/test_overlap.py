"""Ladder residuals hide a team's exchanges behind the MLP, in simulated time; plain residuals cannot."""

from __future__ import annotations

import pytest

from jobs.models import gpt
from strategies.sequence.phases import Phase, Phases, phases_of
from tests.support.overlap import Taken, simulate_team

DEPTH = 6
MLP_HALF = 4.0
"""Seconds of each half of an MLP; everything else takes 1."""


def blocks(*, ladder: bool) -> list[Phases]:
    layers, _ = gpt.build(width=16, depth=DEPTH, heads=2, context=8, ladder=ladder)
    described = [phases_of(layer) for layer in layers[1:-1]]
    return [phases for phases in described if phases is not None]


def seconds(phase: Phase) -> float:
    """A plain block has its whole MLP in its last phase, and the output projection too."""
    if phase.writes[-1] in ("hidden", "left"):
        return MLP_HALF
    return 1.0 + 2 * MLP_HALF * (phase.reads == ("x", "attended"))


def taken(transfer: float, *, ladder: bool) -> Taken:
    return simulate_team(blocks(ladder=ladder), seconds, lambda _: transfer)


@pytest.mark.parametrize("transfer", [0.0, 1.0, MLP_HALF])
def test_what_is_shorter_than_the_compute_beside_it_is_hidden(transfer: float) -> None:
    found = taken(transfer, ladder=True)
    assert found.exposed == 0.0
    assert found.transfers == 4 * DEPTH * transfer  # two a layer, and two for the gradients


def test_of_what_is_longer_only_the_rest_shows() -> None:
    transfer = 2 * MLP_HALF + 1.0
    forward, backward = transfer - MLP_HALF, transfer - 2 * MLP_HALF
    assert taken(transfer, ladder=True).exposed == DEPTH * (2 * forward + 2 * backward)


@pytest.mark.parametrize("transfer", [1.0, MLP_HALF])
def test_plain_residuals_wait_for_every_exchange(transfer: float) -> None:
    found = taken(transfer, ladder=False)
    assert found.exposed == found.transfers == 4 * DEPTH * transfer
    assert found.computing == taken(transfer, ladder=True).computing
