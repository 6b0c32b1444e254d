"""Bytes that a worker keeps and sends for its layers, by sharding: sums over layers, for many stages at once.

Averages over a stage group; ``jobs.bench.footprint`` holds real workers against the same constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARAMETER, SUM, STATE, VERSIONS = 4, 8, 12, 2
"""Bytes per parameter of the working copy, an exact sum and a shard's state, and how many steps' states."""

Count = Any
"""A whole number, or a NumPy array of them."""


@dataclass(frozen=True, slots=True)
class ShardingCost:
    """What is kept whole by every worker of a stage group and what is shared out (Rajbhandari et al., "ZeRO",
    SC'20, sec. 5)."""

    shares_state: bool

    def device_bytes(self, parameters: Count, workers: int) -> Count:
        """Working parameters and exact sums of a worker whose group holds so many parameters."""
        return (PARAMETER + SUM) * parameters

    def host_bytes(self, parameters: Count, workers: int, *, backed_up: bool) -> Count:
        """The states of a worker's own shards, and of those that it keeps for others where ``backed_up``."""
        whole = VERSIONS * STATE * parameters
        shared = -(-whole // workers)
        own, kept = (shared, shared) if self.shares_state else (whole, whole * (workers == 1))
        return own + kept * backed_up

    def sent_bytes(self, parameters: Count, workers: int) -> Count:
        """What a worker sends in a step so that owners have all sums and everybody the new parameters."""
        return (SUM + PARAMETER) * parameters * (workers - 1) / workers


SHARDINGS: Mapping[str, ShardingCost] = {"zero1": ShardingCost(shares_state=True)}
"""By the names that a recipe may give."""
