"""Bytes that a worker keeps and sends for its layers, by sharding, for many stages at once.

What ``shardings.theory`` says of an average worker of a stage group, in closed form and for arrays, because a
search asks it of every range of layers. A test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.plan import Keeping
from strategies.shardings.registry import DEFAULT
from strategies.shardings.registry import SHARDINGS as REGISTRY
from strategies.shardings.theory import PARAMETER, ROUNDED, STATE, SUM, VERSIONS

Count = Any
"""A number, or a NumPy array of them."""


@dataclass(frozen=True, slots=True)
class ShardingCost:
    """What the workers of a stage group share out, where they do not each keep all of it (Rajbhandari et al.,
    "ZeRO", SC'20, sec. 5)."""

    state: bool = True
    sums: bool = False
    parameters: bool = False

    def device_bytes(self, parameters: Count, widest: Count, workers: int) -> Count:
        """Working parameters and exact sums of a worker whose group holds so many parameters, ``widest`` of
        them in two consecutive layers."""
        working = PARAMETER * (widest if self.parameters else parameters)
        return working + -(-SUM * parameters // (workers if self.sums else 1))

    def host_bytes(self, parameters: Count, workers: int, *, backed_up: bool) -> Count:
        """The states of a worker's own shards, and of those that it keeps for others where ``backed_up``."""
        whole = VERSIONS * STATE * parameters
        shared = -(-whole // workers)
        own, kept = (shared, shared) if self.state else (whole, whole * (workers == 1))
        return own + kept * backed_up

    def sent_bytes(self, parameters: Count, workers: int, micro_batches: int, *, splits: bool) -> Count:
        """What a worker that computes so many micro-batches sends in a step, copies for backups left out."""
        reduced = ROUNDED * micro_batches if self.sums else SUM
        passes = 3 if splits else 2
        gathered = PARAMETER * micro_batches * passes if self.parameters else PARAMETER
        return (reduced + gathered) * parameters * (workers - 1) / workers


SHARDINGS: Mapping[str, ShardingCost] = {
    name: ShardingCost(
        state=REGISTRY[name].keeping is not Keeping.STATE,
        sums=not REGISTRY[name].keeps.sums,
        parameters=not REGISTRY[name].keeps.parameters,
    )
    for name in dict.fromkeys((DEFAULT, *REGISTRY))
}
"""Of all that are registered; of those that are alike the first is taken."""
