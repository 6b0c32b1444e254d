"""What a layer costs a team: how its seconds and activations divide, and what goes over the links.

Slices and heads are whole, so that a team's slowest member is the one with the most of them; each value that
one space writes and the other reads goes over the links once forward, and its gradient once backward (Jacobs
et al., "DeepSpeed Ulysses", 2023, sec. 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from strategies.sequence.division import dealt


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
