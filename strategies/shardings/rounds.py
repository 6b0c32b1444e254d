"""The messages of every sharding in ``registry``: what only those who compute import."""

from __future__ import annotations

from collections.abc import Mapping

from strategies.shardings.ddp import ReplicaRounds
from strategies.shardings.zero2 import GradientRounds
from strategies.shardings.zero3 import ParameterRounds
from strategies.zero import ZeroRounds

ROUNDS: Mapping[str, type[ZeroRounds]] = {
    "ddp": ReplicaRounds,
    "zero1": ZeroRounds,
    "zero2": GradientRounds,
    "zero3": ParameterRounds,
}
