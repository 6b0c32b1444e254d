"""The all-to-all between those who hold slices and those who hold heads, within a team.

Both directions are each other's adjoint, so the same two functions serve forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from runtime.fabric.interface import Endpoint, Message, Tag
from runtime.plan import WorkerId
from strategies.sequence.division import dealt, slice_bounds
from strategies.sequence.phases import into_head, into_slice, of_head, of_slice

Parts = Mapping[int, Tensor]
"""A value's tensors by slice or by head."""

Index = tuple[int, ...]
"""Tells exchanges of one pass apart: all members name the same one alike."""


@dataclass
class Exchange:
    """One member's end. A team of one exchanges with nobody and needs no ``endpoint``.

    ``tag`` is that of the pass, and ``slices`` those of the whole team. What is sent must be taken by all
    others; sends do not wait. Interrupts as ``Endpoint`` does.
    """

    slices: int
    team: tuple[WorkerId, ...] = (0,)
    place: int = 0
    endpoint: Endpoint | None = None
    tag: Tag | None = None
    receive: Callable[[WorkerId, Tag], Message] | None = None
    """How to wait for a message of another member."""

    def slices_of(self, place: int) -> range:
        """The slices that the ``place``-th member holds."""
        return dealt(self.slices, len(self.team))[place]

    def heads_of(self, place: int, heads: int) -> range:
        """The heads, of ``heads``, that the ``place``-th member computes."""
        return dealt(heads, len(self.team))[place]

    @property
    def own(self) -> range:
        """The slices of this member."""
        return self.slices_of(self.place)

    def send_slices(self, index: Index, parts: Parts, heads: int) -> None:
        """``parts`` of this member's slices to those who hold the heads."""
        for place in self._others():
            theirs = self.heads_of(place, heads)
            if theirs:
                self._send(place, index, [of_slice(parts[s], theirs) for s in self.own])

    def take_heads(self, index: Index, parts: Parts, heads: int) -> dict[int, Tensor]:
        """This member's heads over the whole sequence, from ``parts`` of its own slices and the others'."""
        mine = self.heads_of(self.place, heads)
        if not mine:
            return {}
        slices: list[Tensor] = []
        for place in range(len(self.team)):
            slices += (
                [of_slice(parts[s], mine) for s in self.own]
                if place == self.place
                else self._receive(place, index)
            )
        return {head: into_head(slices, head - mine.start) for head in mine}

    def send_heads(self, index: Index, parts: Parts, heads: int) -> None:
        """``parts`` of this member's heads to those who hold the slices."""
        if parts:
            for place in self._others():
                self._send(place, index, self._cut(parts, self.slices_of(place)))

    def take_slices(self, index: Index, parts: Parts, heads: int) -> dict[int, Tensor]:
        """This member's slices with all heads, from ``parts`` of its own heads and the others'."""
        by_slice: dict[int, list[Tensor]] = {each: [] for each in self.own}
        for place in range(len(self.team)):
            theirs = self.heads_of(place, heads)
            if not theirs:
                continue
            came = self._cut(parts, self.own) if place == self.place else self._receive(place, index)
            for position, each in enumerate(self.own):
                by_slice[each] += came[position * len(theirs) : (position + 1) * len(theirs)]
        return {each: into_slice(tensors) for each, tensors in by_slice.items()}

    def _cut(self, parts: Parts, slices: range) -> list[Tensor]:
        """What of every head goes to each of ``slices``: by slice, then by head."""
        if not parts:
            return []
        bounds = slice_bounds(next(iter(parts.values())).shape[1], self.slices)
        return [of_head(parts[head], bounds[s], bounds[s + 1]) for s in slices for head in sorted(parts)]

    def _others(self) -> list[int]:
        """The other members' places, beginning after this one's, so that not all send to the same first."""
        return [(self.place + k) % len(self.team) for k in range(1, len(self.team))]

    def _send(self, place: int, index: Index, tensors: Sequence[Tensor]) -> None:
        assert self.endpoint is not None and self.tag is not None
        self.endpoint.send(self.team[place], self.tag._replace(index=index), tensors)

    def _receive(self, place: int, index: Index) -> list[Tensor]:
        assert self.receive is not None and self.tag is not None
        return self.receive(self.team[place], self.tag._replace(index=index)).tensors
