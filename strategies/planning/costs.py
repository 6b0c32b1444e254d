"""What a division of work costs: predicted seconds a step, bytes to move, bytes in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.layout import Layout
from runtime.plan import Member, Plan, WorkerId
from strategies.planning.partition import OUT_OF_REACH, group_rounds, speeds_equal
from strategies.profile import Profile
from strategies.sequence.sharing import Sharing

# All in multiples of a stage's float32 parameters.
STATE = 3
"""Parameters, exp_avg and exp_avg_sq of a shard."""

WORKING = 3
"""A worker's working parameters (1) and its float64 accumulators (2)."""

KEPT = 2 * STATE + 2 * STATE
"""The last two versions of the owned shards and backups of as much, over the group size."""

SYNCHRONISED = 3
"""Reduce-scatter of float64 sums (2) and all-gather of parameters (1), times (g - 1) / g."""

BYTES_PER_PARAMETER = 4


@dataclass(frozen=True)
class CostModel:
    """Measured costs, one entry per layer.

    ``forward_seconds`` and ``backward_seconds`` are per micro-batch at speed 1.0;
    ``parameter_bytes`` count float32 parameters (a shared one in every layer that uses it);
    ``boundary_bytes[l]`` passes from layer l to l + 1 per micro-batch (empty: unknown, taken as 0).
    A move's seconds are spread over ``amortised_steps`` steps. ``worker_memory_bytes`` is what a
    worker has for parameters, accumulators, state, backups and activations; None: plenty.

    ``split_seconds`` are the (input gradient, weight gradient) of a backward that is taken in two parts
    (empty: each the half of a whole one). ``kept_bytes[l]`` is what layer l keeps of a micro-batch from
    forward to backward, its input left out and its output counted (empty: unknown, taken as 0);
    ``entry_bytes`` is the first layer's input. ``host_state``: state and backups are in another memory than
    ``worker_memory_bytes``, which offloaded parameters reach at ``host_bytes_per_second``.

    ``link_seconds_per_message`` passes with every message, however short. ``sharing`` says of every layer how
    a team divides it into ``slices`` (None: as many as the team has workers); empty: no layer can be.
    """

    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    parameter_bytes: tuple[int, ...]
    link_bytes_per_second: float = 1e9
    boundary_bytes: tuple[int, ...] = ()
    amortised_steps: int = 100
    worker_memory_bytes: int | None = None
    split_seconds: tuple[tuple[float, float], ...] = ()
    kept_bytes: tuple[int, ...] = ()
    entry_bytes: int = 0
    host_state: bool = False
    host_bytes_per_second: float = 12e9
    link_seconds_per_message: float = 0.0
    sharing: tuple[Sharing, ...] = ()
    slices: int | None = None

    @classmethod
    def unmeasured(cls, layout: Layout, seconds: float = 0.01) -> CostModel:
        """Before the first measurement: every layer takes about ``seconds`` (a multiple of ``TICK``, as what
        is measured) forward, twice that backward."""
        (seconds,) = levelled([seconds])
        return cls(
            forward_seconds=(seconds,) * layout.layers,
            backward_seconds=(2 * seconds,) * layout.layers,
            parameter_bytes=tuple(
                BYTES_PER_PARAMETER * sum(block.size for block in layout.blocks_of(layer, layer + 1))
                for layer in range(layout.layers)
            ),
        )

    @classmethod
    def profiled(cls, layout: Layout, profile: Profile, **settings: Any) -> CostModel:
        """As a warm-up in detail found it, nothing recomputed; ``settings`` are further fields."""
        return replace(
            cls.unmeasured(layout),
            forward_seconds=levelled(profile.forward),
            backward_seconds=levelled(profile.backward),
            boundary_bytes=profile.boundary_bytes,
            split_seconds=tuple(
                zip(*(levelled(part) for part in zip(*profile.split_seconds, strict=True)), strict=True)
            ),
            kept_bytes=profile.kept_bytes,
            entry_bytes=profile.entry_bytes,
            sharing=profile.sharing,
            **settings,
        )

    def paced(self, forward: Sequence[float], recomputed: Collection[int] = ()) -> CostModel:
        """With layers that take ``forward`` seconds and as much longer in backward as forward; ``recomputed``
        are the layers whose backward has their forward in it, which is taken out."""
        levels = levelled(forward)
        pace = [new / old for new, old in zip(levels, self.forward_seconds, strict=True)]
        own = [
            max(b - (f if layer in recomputed else 0.0), TICK)
            for layer, (f, b) in enumerate(zip(self.forward_seconds, self.backward_seconds, strict=True))
        ]
        return replace(
            self,
            forward_seconds=levels,
            backward_seconds=levelled([b * p for b, p in zip(own, pace, strict=True)]),
            split_seconds=tuple((i * p, w * p) for (i, w), p in zip(self.split_seconds, pace, strict=False)),
        )


NOISE = 0.1
"""Layers whose measured seconds differ by no more than this, relatively, count as equally long."""


TICK = 2.0**-24
"""Seconds. Sums of multiples of it are exact, so that equal layers make equal sums and ties stay ties."""


def levelled(seconds: Sequence[float]) -> tuple[float, ...]:
    """Measured seconds per layer with noise taken out: layers of about the same length get their mean,
    in multiples of ``TICK`` (at least one).

    A model's layers are mostly alike, so their cuts tie, and a percent of noise would break the ties at
    random: over 40 simulated series of losses with 2% of noise the worst plan's share of the ideal rose
    from 0.897 to 0.92 by this.
    """
    order = sorted(range(len(seconds)), key=lambda layer: seconds[layer])
    result = [0.0] * len(seconds)
    begin = 0
    for end in range(1, len(order) + 1):
        if end < len(order) and seconds[order[end]] <= seconds[order[begin]] * (1 + NOISE):
            continue
        mean = sum(seconds[layer] for layer in order[begin:end]) / (end - begin)
        mean = max(round(mean / TICK), 1) * TICK
        for layer in order[begin:end]:
            result[layer] = mean
        begin = end
    return tuple(result)


@dataclass(frozen=True, slots=True)
class Division:
    """Layers cut at ``bounds``; ``groups[k]``, ascending, holds layers bounds[k] to bounds[k+1] - 1."""

    bounds: tuple[int, ...]
    groups: tuple[tuple[WorkerId, ...], ...]

    def stages(self) -> Iterator[tuple[int, int, tuple[WorkerId, ...]]]:
        """(first layer, stop layer, group) of every stage."""
        return zip(self.bounds, self.bounds[1:], self.groups, strict=False)


class Predictor:
    """Closed-form predictions for one set of members; a few microseconds per stage each."""

    def __init__(
        self, costs: CostModel, members: Sequence[Member], micro_batches: int, previous: Plan | None
    ) -> None:
        self.costs, self.micro_batches, self.previous = costs, micro_batches, previous
        self.speed = {member.worker: member.speed for member in members}
        self.layer_seconds = [
            f + b for f, b in zip(costs.forward_seconds, costs.backward_seconds, strict=True)
        ]
        self._seconds_before = list(accumulate(self.layer_seconds, initial=0.0))
        self._forward_before = list(accumulate(costs.forward_seconds, initial=0.0))
        self._bytes_before = list(accumulate(costs.parameter_bytes, initial=0))
        self._rounds: dict[tuple[WorkerId, ...], float] = {}
        self._power: dict[tuple[WorkerId, ...], float] = {}
        stages = previous.stages if previous is not None else ()
        self._held = {w: (stage.first, stage.stop) for stage in stages for w in stage.workers}

    def seconds_of(self, first: int, stop: int) -> float:
        """Forward and backward of layers first to stop - 1, one micro-batch at speed 1.0."""
        return self._seconds_before[stop] - self._seconds_before[first]

    def seconds_each_way(self, first: int, stop: int) -> tuple[float, float]:
        """``seconds_of``, forward and backward apart."""
        forward = self._forward_before[stop] - self._forward_before[first]
        return forward, self.seconds_of(first, stop) - forward

    def bytes_of(self, first: int, stop: int) -> int:
        """Parameter bytes of layers first to stop - 1; 0 where the range is empty."""
        return self._bytes_before[stop] - self._bytes_before[first] if first < stop else 0

    def rounds(self, group: tuple[WorkerId, ...]) -> float:
        """``group_rounds`` of the group's speeds, remembered: candidates share many groups."""
        rounds = self._rounds.get(group)
        if rounds is None:
            rounds = group_rounds([self.speed[worker] for worker in group], self.micro_batches)
            self._rounds[group] = rounds
        return rounds

    def power(self, group: tuple[WorkerId, ...]) -> float:
        """The sum of the group's speeds, remembered."""
        power = self._power.get(group)
        if power is None:
            power = self._power[group] = sum(map(self.speed.__getitem__, group))
        return power

    def once(self, group: tuple[WorkerId, ...]) -> float:
        """The mean time of one micro-batch in the group where it takes 1 at speed 1.0."""
        return len(group) / self.power(group)

    def fill_weight(self, group: tuple[WorkerId, ...]) -> float:
        """``rounds`` less one micro-batch: what a stage's seconds add to the pipeline beyond the one
        pass through all stages. Never quite 0, for layers must be cut evenly even then."""
        rounds = self.rounds(group)
        return max(rounds - self.once(group), 1e-3 * rounds)

    def alike(self, workers: Sequence[WorkerId]) -> bool:
        """Whether the workers are all equally fast, within what is noise."""
        return speeds_equal([self.speed[worker] for worker in workers])

    def many(
        self, bounds_CB: NDArray[np.int64], sizes_CK: NDArray[np.int64], weights_CK: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(``pipeline_seconds_C``, ``memory_bytes_C``) of many divisions of as many stages, the former
        with one pass at the mean speed of all workers."""
        seconds_CK = np.diff(np.asarray(self._seconds_before)[bounds_CB], axis=1)
        bytes_CK = np.diff(np.asarray(self._bytes_before, dtype=np.int64)[bounds_CB], axis=1)
        longest_C = (seconds_CK * weights_CK).max(axis=1)
        memory_CK = -(-bytes_CK * (WORKING * sizes_CK + KEPT) // sizes_CK)
        return self.seconds_of(0, len(self.layer_seconds)) + longest_C, memory_CK.max(axis=1)

    def even_memory_bytes(self, stages: int, workers: int) -> float:
        """What a worker would hold if layers and workers divided evenly into ``stages``."""
        return self._bytes_before[-1] / stages * (WORKING + KEPT * stages / workers)

    def load(self, first: int, stop: int, group: tuple[WorkerId, ...]) -> float:
        """Seconds for which the busiest worker of a stage group computes in a step."""
        return self.seconds_of(first, stop) * self.rounds(group)

    def pipeline_seconds(self, division: Division) -> float:
        """Computation with fill and drain: the bottleneck's load and one pass of the other stages.

        With equal groups and stages this is 1F1B's (M / g + P - 1) (forward + backward).
        """
        passes, longest = 0.0, 0.0
        for first, stop, group in division.stages():
            once = self.seconds_of(first, stop) * self.once(group)
            passes += once
            longest = max(longest, self.load(first, stop, group) - once)
        return passes + longest

    def communication_seconds(self, division: Division) -> float:
        """Gradients and parameters of the slowest group, and one micro-batch over every boundary and
        back (the other micro-batches' messages overlap with computation)."""
        link = self.costs.link_bytes_per_second
        synchronised = max(
            SYNCHRONISED * self.bytes_of(first, stop) * (len(group) - 1) / len(group)
            for first, stop, group in division.stages()
        )
        crossed = 0
        if self.costs.boundary_bytes:
            crossed = 2 * sum(self.costs.boundary_bytes[bound - 1] for bound in division.bounds[1:-1])
        return (synchronised + crossed) / link

    def moves(self, division: Division) -> tuple[int, float]:
        """(bytes over all links, seconds of the worker that receives most) to get there from the
        previous plan. Takes the state and backups of a layer as moved whole where its group
        changes: an upper bound, fit to compare candidates. (0, 0.0) for a first plan."""
        if self.previous is None:
            return 0, 0.0
        total, most = 0, 0.0
        for first, stop, group in division.stages():
            changed = sum(
                self.bytes_of(max(first, stage.first), min(stop, stage.stop))
                for stage in self.previous.stages
                if stage.first < stop and first < stage.stop and stage.workers != group
            )
            total += 2 * STATE * changed
            # workers that held the same before are alike: count them
            for held, workers in Counter(map(self._held.get, group)).items():
                kept = 0 if held is None else self.bytes_of(max(first, held[0]), min(stop, held[1]))
                new = self.bytes_of(first, stop) - kept
                total += new * workers
                most = max(most, new + 2 * STATE * changed / len(group))
        return total, most / self.costs.link_bytes_per_second

    def memory_bytes(self, division: Division) -> int:
        """The largest worker's parameters, accumulators, state, versions and backups."""
        return max(
            -(-self.bytes_of(first, stop) * (WORKING * len(group) + KEPT) // len(group))
            for first, stop, group in division.stages()
        )

    def fewest_workers(self) -> NDArray[np.int64] | None:
        """[first layer, stop layer] -> the smallest group that fits the memory limit, for
        ``cut_layers``; None where there is no limit."""
        limit = self.costs.worker_memory_bytes
        if limit is None:
            return None
        before = np.asarray(self._bytes_before, dtype=np.int64)
        held = np.maximum(before[None, :] - before[:, None], 0)
        room = limit - WORKING * held
        fewest = -(-KEPT * held // np.maximum(room, 1))
        return np.where(room > 0, np.maximum(fewest, 1), OUT_OF_REACH)
