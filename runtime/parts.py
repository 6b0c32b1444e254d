"""Which parts of which checkpoints are on disk, and which checkpoints are therefore due to be made whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.layout import Layout
from runtime.plan import WorkerId
from runtime.protocol import Written
from runtime.signals import Durable, WriteManifest


@dataclass
class CheckpointParts:
    """The controller's account of checkpoints. ``durable`` is the newest whole one."""

    layout: Layout
    durable: Durable | None = None
    _parts: dict[tuple[int, int], dict[WorkerId, Written]] = field(default_factory=dict)
    _writing: set[int] = field(default_factory=set)

    def written(self, report: Written) -> None:
        if self.durable is None or report.version > self.durable.version:
            # parts written under different plans overlap, so only those of one generation make a whole
            self._parts.setdefault((report.version, report.generation), {})[report.worker] = report

    def due(self, recorded: int) -> list[WriteManifest]:
        """Orders for the checkpoints whose parts are whole and whose step is on record (``recorded`` is the
        newest that is): a run that goes on from a checkpoint has no gap in its log."""
        orders: list[WriteManifest] = []
        for (version, _), parts in sorted(self._parts.items()):
            files = tuple(sorted((part.file for part in parts.values()), key=lambda file: file.name))
            pieces = (piece for file in files for piece in file.pieces)
            if version in self._writing or version > recorded:
                continue
            if covers(self.layout, pieces):
                self._writing.add(version)
                orders.append(WriteManifest(version, next(iter(parts.values())).exponents, files))
        return orders

    def give_up(self) -> list[int]:
        """A checkpoint of the plan that ends now, whose parts are not all there, stays unfinished: its
        version."""
        versions = sorted({version for version, _ in self._parts} - self._writing)
        self._parts = {key: parts for key, parts in self._parts.items() if key[0] in self._writing}
        return versions

    def whole(self, durable: Durable) -> None:
        self._writing.discard(durable.version)
        if self.durable is None or durable.version > self.durable.version:
            self.durable = durable
        self._parts = {key: parts for key, parts in self._parts.items() if key[0] > durable.version}

    def failed(self, version: int) -> None:
        self._writing.discard(version)
        self._parts = {key: parts for key, parts in self._parts.items() if key[0] != version}

    def reaches(self, version: int) -> bool:
        """Whether a whole checkpoint of ``version`` or a later one exists."""
        return self.durable is not None and self.durable.version >= version


def covers(layout: Layout, pieces: Iterable[tuple[int, int, int]]) -> bool:
    """Whether the pieces (block, start, stop) together cover every block."""
    reached: dict[int, int] = {}
    for block, start, stop in sorted(pieces):
        if start <= reached.get(block, 0):
            reached[block] = max(stop, reached.get(block, 0))
    return all(reached.get(block.index, 0) >= block.size for block in layout.blocks)
