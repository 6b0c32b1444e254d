"""Parameters that are in host memory and come to the device layer by layer, as they are needed.

In the manner of Superpipeline: a window of k layers is resident and k' of them are moved at a time, so that
whoever computes finds the next move's layers on their way (on CUDA by a stream of their own, from pinned
memory). Any sharding that keeps its parameters whole can be offloaded; sums are kept in host memory too. On a
CPU the window is memory of its own like a device's, which shows what would be resident and spares nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from strategies.options import Offload
from strategies.residence import Residence
from strategies.stage import StageModel


def moves_of(first: int, stop: int, offload: Offload) -> list[range]:
    """The layers ``first`` to ``stop`` - 1 of a stage as they are moved together."""
    return [range(start, min(start + offload.move, stop)) for start in range(first, stop, offload.move)]


class StreamedLayers:
    """The window of a stage whose parameters are at home in host memory. Of what is resident, the move that
    has not computed for longest goes first: as a pass turns round from forward to backward, the last ones are
    still there. ``moved_bytes`` counts what has come from the host."""

    def __init__(self, stage: StageModel, offload: Offload) -> None:
        assert stage.residence is not None
        self.moved_bytes = 0
        self._stage = stage
        self._residence: Residence = stage.residence
        self._most = offload.window // offload.move
        self._moves: list[range] = []
        self._move_of: dict[int, int] = {}
        self._stage_of: list[int] = []
        """By move: which of the held stages it is part of."""
        for k, held in enumerate(stage.held):
            for layers in moves_of(*held, offload):
                self._move_of.update(dict.fromkeys(layers, len(self._moves)))
                self._moves.append(layers)
                self._stage_of.append(k)
        self._here: list[int] = []
        """Resident moves, the one that was used last at the end."""
        self._computing = -1
        """The move that was entered last."""
        self._users: Counter[int] = Counter()
        """How many resident moves use a block."""
        self._stream: torch.cuda.Stream | None = None
        if stage.device.type == "cuda":
            self._stream = torch.cuda.Stream(stage.device)  # type: ignore[no-untyped-call]
        self._arrivals: dict[int, torch.cuda.Event] = {}
        self._residence.clear()

    def enter(self, layer: int, following: int | None) -> None:
        move = self._move_of[layer]
        if move in self._here:
            if move != self._computing:
                self._here.remove(move)
                self._here.append(move)
                self._shrink(self._most)
        else:
            self._shrink(self._most - 1)
            self._fetch(move)
        self._computing = move
        self._arrive(move)
        if following is not None:
            ahead = move + (1 if following > layer else -1)
            together = 0 <= ahead < len(self._moves) and self._stage_of[ahead] == self._stage_of[move]
            if together and ahead not in self._here:
                self._fetch(ahead)

    def _shrink(self, moves: int) -> None:
        while len(self._here) > moves:
            self._release(self._here[0])

    def leave(self, layer: int) -> None:
        """Nothing goes before its place is wanted."""

    def renew(self) -> None:
        """What is resident is out of date."""
        self._residence.clear()
        self._here.clear()
        self._users.clear()
        self._arrivals.clear()

    def _blocks(self, move: int) -> Sequence[int]:
        layers = self._moves[move]
        return [block.index for block in self._stage.layout.blocks_of(layers.start, layers.stop)]

    def _fetch(self, move: int) -> None:
        self._here.append(move)
        fresh = [block for block in self._blocks(move) if not self._users[block]]
        self._users.update(self._blocks(move))
        flats = {block: self._residence.occupy(block) for block in fresh}
        self.moved_bytes += sum(flat_N.nbytes for flat_N in flats.values())
        if self._stream is None:
            for block, flat_N in flats.items():
                flat_N.copy_(self._stage.working[block])
            return
        # their memory may still be read by what was computed last
        self._stream.wait_stream(torch.cuda.current_stream(self._stage.device))
        with torch.cuda.stream(self._stream):
            for block, flat_N in flats.items():
                flat_N.copy_(self._stage.working[block], non_blocking=True)
        self._arrivals[move] = self._stream.record_event()

    def _arrive(self, move: int) -> None:
        """What is computed from now on, or put where the parameters are, waits for them to be there."""
        event = self._arrivals.pop(move, None)
        if event is not None:
            torch.cuda.current_stream(self._stage.device).wait_event(event)

    def _release(self, move: int) -> None:
        self._arrive(move)
        self._here.remove(move)
        for block in self._blocks(move):
            self._users[block] -= 1
            if not self._users[block]:
                self._residence.vacate(block)
