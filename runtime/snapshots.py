"""The versions of shard state that a worker keeps, as owner and as backup holder.

State of a shard is one float32 tensor (3, n): parameters, exp_avg, exp_avg_sq. Version v is the
state after v optimizer steps. Nothing is changed in place: a step writes version v + 1 beside
version v, so whatever happens in mid-step leaves a whole version behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from runtime.resharding import Holding

ROWS = 3
"""Rows of a state tensor: parameters, exp_avg, exp_avg_sq."""

Piece = tuple[int, int, int]
"""(block, start, stop), in elements of the block."""


class ShardStore:
    """Pieces of blocks, each in one or more versions. Used by one thread at a time."""

    def __init__(self) -> None:
        self._pieces: dict[Piece, dict[int, Tensor]] = {}
        self._spare: dict[int, list[Tensor]] = {}

    def put(self, piece: Piece, version: int, state_3N: Tensor) -> None:
        """Keeps ``state_3N`` (not a copy of it) as ``version`` of ``piece``."""
        block, start, stop = piece
        assert state_3N.shape == (ROWS, stop - start), f"state of block {block} has shape {state_3N.shape}"
        self._pieces.setdefault(piece, {})[version] = state_3N

    def get(self, piece: Piece, version: int) -> Tensor | None:
        """Exactly this piece in exactly this version, not a copy of it."""
        return self._pieces.get(piece, {}).get(version)

    def read(self, piece: Piece, version: int) -> Tensor | None:
        """A copy of any interval, put together from what is kept of it; None where a part is missing."""
        block, start, stop = piece
        state_3N = torch.empty(ROWS, stop - start)
        covered = start
        for begin, end, kept in sorted(self._versions_of(block, version), key=lambda item: item[:2]):
            low, high = max(begin, covered), min(end, stop)
            if low > covered or covered >= stop:
                break
            if low < high:
                state_3N[:, low - start : high - start] = kept[:, low - begin : high - begin]
                covered = high
        return state_3N if covered >= stop else None

    def _versions_of(self, block: int, version: int) -> Iterator[tuple[int, int, Tensor]]:
        for (owner, start, stop), versions in self._pieces.items():
            if owner == block and version in versions:
                yield start, stop, versions[version]

    def parts(self, piece: Piece, version: int) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, view of the state) of whatever parts of ``piece`` are kept, possibly overlapping."""
        block, start, stop = piece
        for begin, end, kept in self._versions_of(block, version):
            low, high = max(begin, start), min(end, stop)
            if low < high:
                yield low, high, kept[:, low - begin : high - begin]

    def buffer(self, size: int) -> Tensor:
        """Memory for a state of ``size`` elements, of a dropped version where there is one."""
        spare = self._spare.get(size)
        return spare.pop() if spare else torch.empty(ROWS, size)

    def prepare(self, sizes: Sequence[int]) -> list[Tensor]:
        """The buffers of states of these sizes, made ahead of time; none where states are kept already."""
        if self._pieces:
            return []
        self._spare = {}
        for size in sizes:
            self._spare.setdefault(size, []).append(torch.empty(ROWS, size))
        return [state for states in self._spare.values() for state in states]

    def drop(self, *, before: int = 0, after: int | None = None) -> None:
        """Forgets versions below ``before`` and above ``after``; their memory serves later versions."""
        if not self._pieces:
            return  # what was prepared is still to be used
        spare: dict[int, list[Tensor]] = {}
        for piece, versions in list(self._pieces.items()):
            for version in [v for v in versions if v < before or (after is not None and v > after)]:
                spare.setdefault(piece[2] - piece[1], []).append(versions.pop(version))
            if not versions:
                del self._pieces[piece]
        self._spare = spare

    def clear(self) -> None:
        self._pieces.clear()
        self._spare.clear()

    def holdings(self) -> tuple[Holding, ...]:
        """Everything kept, in a fixed order."""
        return tuple(
            Holding(block, start, stop, version)
            for (block, start, stop), versions in sorted(self._pieces.items())
            for version in sorted(versions)
        )

    def bytes(self) -> int:
        """Bytes of all kept versions and spare buffers."""
        kept = sum(state.nbytes for versions in self._pieces.values() for state in versions.values())
        return kept + sum(state.nbytes for states in self._spare.values() for state in states)
