"""What a layer costs a team: how its seconds and activations divide, and what goes over the links.

Slices and heads are whole, so that a team's slowest member is the one with the most of them; each value that
one space writes and the other reads goes over the links once forward, and its gradient once backward (Jacobs
et al., "DeepSpeed Ulysses", 2023, sec. 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from strategies.sequence.division import dealt
from strategies.sequence.phases import Space, phases_of

RUNS = 2
"""The faster one counts."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Of one layer and micro-batch. ``head_share``: the part of its seconds that is computed head by head,
    the rest is by slices; ``exchanged_bytes``: of its ``exchanges`` values, each whole and counted once."""

    heads: int = 0
    head_share: float = 0.0
    exchanges: int = 0
    exchanged_bytes: int = 0

    def ratio(self, team: int, slices: int) -> float:
        """Seconds of the member of a team that has most to compute, over those of one worker alone."""
        by_slice = most(slices, team) / slices
        by_head = most(self.heads, team) / self.heads if self.heads else by_slice
        return (1.0 - self.head_share) * by_slice + self.head_share * by_head

    def sent_bytes(self, team: int, slices: int) -> float:
        """Of the member that sends most, in a forward or a backward: the half of what it sends in both."""
        if not self.heads:
            return 0.0
        members = zip(dealt(slices, team), dealt(self.heads, team), strict=True)
        parts = ((len(s) / slices, len(h) / self.heads) for s, h in members)
        return self.exchanged_bytes / 2 * max(s * (1 - h) + (1 - s) * h for s, h in parts)

    def waits(self, team: int) -> int:
        """How often a message's way is waited for in a forward or a backward: a member's messages to all
        others are on their way together, for sends do not wait."""
        return self.exchanges if team > 1 else 0

    def kept_share(self, team: int, slices: int) -> Fraction:
        """The part of what the layer keeps, its output left out, that a member of a team keeps at most: an
        upper bound, since what is kept by slices and what by heads are not told apart."""
        by_slice = slice_share(team, slices)
        return max(by_slice, Fraction(most(self.heads, team), self.heads)) if self.heads else by_slice


def most(parts: int, team: int) -> int:
    """How many of ``parts`` the member of a team has that has most."""
    return -(-parts // team)


def slice_share(team: int, slices: int) -> Fraction:
    """The part of what passes between layers that the member of a team has that has most."""
    return Fraction(most(slices, team), slices)


def sharing_of(layer: nn.Module, inputs: Sequence[Tensor], lap: Callable[[], float]) -> Sharing | None:
    """By ``RUNS`` forwards, phase by phase; None for a layer that does not say how it can be divided.
    ``lap``: the seconds since it was last called. ``inputs`` are ``B T ...``."""
    phases = phases_of(layer)
    if phases is None:
        return None
    best = (0.0, 0.0)
    exchanged: dict[str, int] = {}
    for run in range(RUNS):
        known: dict[tuple[str, Space], list[Tensor]] = {
            (name, Space.SLICES): [tensor] for name, tensor in zip(phases.inputs, inputs, strict=True)
        }
        seconds = dict.fromkeys(Space, 0.0)
        for phase in phases.steps:
            for name in phase.reads:
                if (name, phase.space) in known:
                    continue
                parts = known[name, phases.home[name]]
                exchanged[name] = sum(part.nbytes for part in parts)
                to_heads = phase.space is Space.HEADS
                known[name, phase.space] = (
                    list(parts[0].unbind(2)) if to_heads else [torch.stack(parts, dim=2)]
                )
            lap()
            made = [
                phase.run(*(known[name, phase.space][part] for name in phase.reads))
                for part in range(phase.parts if phase.space is Space.HEADS else 1)
            ]
            seconds[phase.space] += lap()
            for name, tensors in zip(phase.writes, zip(*made, strict=True), strict=True):
                known[name, phase.space] = list(tensors)
        taken = (sum(seconds.values()), seconds[Space.HEADS])
        best = taken if run == 0 else min(best, taken)
    heads = [phase.parts for phase in phases.steps if phase.space is Space.HEADS]
    return Sharing(
        heads=min(heads, default=0),
        head_share=best[1] / best[0] if best[0] > 0 else 0.0,
        exchanges=len(exchanged),
        exchanged_bytes=sum(exchanged.values()),
    )
