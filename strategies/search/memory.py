"""Bytes that a worker needs: parameters, sums, state and copies by sharding, activations by schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

PARAMETER, SUM, STATE, VERSIONS = 4, 8, 12, 2
"""Bytes per parameter of the working copy, an exact sum and a shard's state, and how many steps' states."""


@dataclass(frozen=True, slots=True)
class ShardingCost:
    """What a sharding keeps and sends for a stage of so many parameters and so many workers.

    ``device_bytes``: a worker's working parameters and sums. ``host_bytes``: the states of its own shards and
    of those that it keeps for others, without backups where there is one worker only (``backed_up`` false).
    ``sent_bytes``: what one worker sends in a step to reduce gradients and to gather parameters.
    """

    device_bytes: Callable[[int, int], int]
    host_bytes: Callable[[int, int, bool], int]
    sent_bytes: Callable[[int, int], float]


def _zero1_host(parameters: int, workers: int, backed_up: bool) -> int:
    return -(-STATE * VERSIONS * parameters * (1 + backed_up) // workers)


SHARDINGS: Mapping[str, ShardingCost] = {
    "zero1": ShardingCost(
        lambda parameters, workers: (PARAMETER + SUM) * parameters,
        _zero1_host,
        lambda parameters, workers: (SUM + PARAMETER) * parameters * (workers - 1) / workers,
    ),
}
