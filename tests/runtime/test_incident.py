"""What the account of a recovery says where further losses come before it is over."""

from __future__ import annotations

import pytest

from runtime.incident import Incident
from runtime.protocol import StateSource


def account(*recoveries: tuple[int, StateSource]) -> tuple[int, StateSource]:
    """(version, source) of the account, where a loss interrupted each recovery but the last."""
    incident = Incident(step=5, workers_before=4, began=10.0)
    for lost, (version, source) in enumerate(recoveries):
        incident.lose(lost, "process died", 10.0 + lost, None)
        incident.agreed(10.1 + lost)
        incident.planned([3], version, source, lost_work=0.5)
    incident.sent(13.0)
    incident.moved(3, 0, 13.5)
    assert incident.over
    recovered = incident.recovered()
    return recovered.from_version, recovered.source


@pytest.mark.parametrize(
    ("recoveries", "told"),
    [
        ([(4, "peers")], (4, "peers")),
        ([(4, "peers"), (3, "peers")], (3, "peers")),
        ([(4, "peers"), (2, "checkpoint")], (2, "checkpoint")),
        ([(2, "checkpoint"), (2, "peers")], (2, "checkpoint")),  # peers that had read the checkpoint
        ([(2, "checkpoint"), (3, "peers")], (2, "checkpoint")),  # and had gone on by then
        ([(2, "checkpoint"), (0, "initial")], (0, "initial")),
        ([(0, "initial"), (0, "peers")], (0, "initial")),
    ],
)
def test_that_it_went_back_is_told_whatever_comes_after(
    recoveries: list[tuple[int, StateSource]], told: tuple[int, StateSource]
) -> None:
    assert account(*recoveries) == told
