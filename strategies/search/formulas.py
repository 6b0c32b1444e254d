"""What every schedule costs in closed form: how much of a stage goes into fill and drain, what is in flight.

Each is the textbook's (see the schedules' own files) for stages of any length: a step takes the sum of all
stages' ``fill`` and, of the slowest, what its micro-batches take beyond that. A group that holds several
stages counts as if all were as long as the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from strategies.schedules.limits import BURSTS

Seconds = Any
"""A float, or a NumPy array of them."""

Count = Any
"""A whole number, or a NumPy array of them."""


class Held(NamedTuple):
    """Whose activations are meant: a worker of stage group ``k`` of groups of ``sizes`` workers.

    The group holds ``chunks`` stages, each of ``layers`` of the model's ``total``, the first stage has
    ``first_layers``; the busiest worker computes ``rounds`` micro-batches.
    """

    sizes: tuple[int, ...]
    k: int
    layers: Count
    first_layers: Count
    total: int
    rounds: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Formula:
    """``fill`` takes a stage's seconds of one micro-batch, forward, input gradient and weight gradient, and
    the chunks of a worker. ``in_flight`` returns the most chunks x micro-batches whose activations a worker
    keeps; ``by_first_stage``: it rises with the first stage's layers. ``splits``: backward is taken in two
    parts.
    """

    fill: Callable[[Seconds, Seconds, Seconds, Count], Seconds]
    in_flight: Callable[[Held], Count]
    splits: bool = False
    chunks: tuple[int, ...] = (1,)
    """How many stages a worker may hold, as far as it is worth looking."""

    by_first_stage: bool = False


def _whole(forward: Seconds, input_gradient: Seconds, weight_gradient: Seconds, chunks: Count) -> Seconds:
    return (forward + input_gradient + weight_gradient) / chunks


def _split(forward: Seconds, input_gradient: Seconds, weight_gradient: Seconds, chunks: Count) -> Seconds:
    gap = forward + input_gradient - weight_gradient
    return gap * (gap > 0)


def _all(held: Held) -> Count:
    return held.rounds


def _limit(held: Held, stage: int, layers: Count) -> Count:
    """``limits.group_limit`` of one of the worker's stages, if it has so many layers."""
    limit, equal = _group_limit(held.sizes, held.chunks, stage)
    if equal:
        return limit
    if isinstance(layers, int):  # NumPy takes its time for a single number, of which there are many
        return max(limit + 1, min(limit + BURSTS, held.total // layers))
    return _by_layers(limit, held.total)[layers]


@lru_cache(maxsize=4096)
def _by_layers(limit: int, total: int) -> NDArray[np.int64]:
    """``_limit`` of unequal groups, by the number of layers (from 0, which no stage has)."""
    layers_L = np.maximum(np.arange(total + 1), 1)
    limit_L: NDArray[np.int64] = np.maximum(limit + 1, np.minimum(limit + BURSTS, total // layers_L))
    return limit_L


@lru_cache(maxsize=4096)
def _group_limit(sizes: tuple[int, ...], chunks: int, stage: int) -> tuple[int, bool]:
    """(what is in flight of a pipeline of equals, whether the groups from ``stage`` on are)."""
    rest = (sizes * chunks)[stage:]
    return -(-sum(rest) // rest[0]), len(set(rest)) == 1


def _round_trip(held: Held) -> Count:
    limit = _limit(held, held.k, held.layers)
    return min(limit, held.rounds) if isinstance(limit, int) else np.minimum(limit, held.rounds)


def _as_the_first(held: Held) -> Count:
    first = _limit(held, 0, held.first_layers)
    room = first * held.first_layers // held.layers
    limit = _limit(held, held.k, held.layers)
    if isinstance(room, int) and isinstance(limit, int):
        return min(max(limit, room), held.rounds)
    return np.minimum(np.maximum(limit, room), held.rounds)


def _warm_up(held: Held) -> Count:
    """In the paper's order, or (whatever is there first) every chunk up to its limit."""
    groups = len(held.sizes)
    most: Count = 2 * (groups - 1 - held.k) + (held.chunks - 1) * groups + 1
    if len(set(held.sizes)) > 1 or held.rounds % groups:
        most = sum(_limit(held, held.k + chunk * groups, held.layers) for chunk in range(held.chunks))
    all_ = held.chunks * held.rounds
    return min(most, all_) if isinstance(most, int) else np.minimum(most, all_)


FORMULAS: Mapping[str, Formula] = {
    "1f1b": Formula(_whole, _round_trip),
    "gpipe": Formula(_whole, _all),
    "interleaved": Formula(_whole, _warm_up, chunks=(2, 4)),
    "zero-bubble": Formula(_split, _as_the_first, splits=True, by_first_stage=True),
}
"""By the names of ``schedules.registry``; of those that are alike the first is taken. A schedule that is not
here is not searched for."""


@lru_cache(maxsize=8192)
def in_flight_by_layers(
    schedule: str, chunks: int, sizes: tuple[int, ...], rounds: tuple[int, ...], first_layers: int, total: int
) -> tuple[tuple[Count, int | bytes], ...]:
    """Of every group (``in_flight`` for every number of layers, from 1, or one number where that makes no
    difference, a key of it). ``rounds``: of each; the first stage has as many layers as are said, for others
    than its own group."""
    formula, layers_L = FORMULAS[schedule], np.arange(1, total + 1)
    found: list[tuple[Count, int | bytes]] = []
    for k, rounds_k in enumerate(rounds):
        first = layers_L if formula.by_first_stage and k == 0 else first_layers
        in_flight = formula.in_flight(Held(sizes, k, layers_L, first, total, rounds_k, chunks))
        if isinstance(in_flight, np.ndarray):
            in_flight.flags.writeable = False
            found.append((in_flight, in_flight.tobytes()))
        else:
            found.append((int(in_flight), int(in_flight)))
    return tuple(found)
