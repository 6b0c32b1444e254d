"""Which parts of which checkpoints are on disk, and which checkpoints are therefore due to be made whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.layout import Layout
from runtime.plan import WorkerId
from runtime.protocol import Written
from runtime.signals import Durable, WriteManifest


@dataclass
class _Parts:
    """``elements``: how many all pieces have together."""

    by_worker: dict[WorkerId, Written] = field(default_factory=dict)
    elements: int = 0

    def add(self, report: Written) -> None:
        known = self.by_worker.get(report.worker)
        self.elements += _elements(report) - (0 if known is None else _elements(known))
        self.by_worker[report.worker] = report


@dataclass
class CheckpointParts:
    """The controller's account of checkpoints. ``durable`` is the newest whole one."""

    layout: Layout
    durable: Durable | None = None
    _parts: dict[tuple[int, int], _Parts] = field(default_factory=dict)
    _writing: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._wanted = sum(block.size for block in self.layout.blocks)

    def written(self, report: Written) -> None:
        if self.durable is None or report.version > self.durable.version:
            # parts written under different plans overlap, so only those of one generation make a whole
            self._parts.setdefault((report.version, report.generation), _Parts()).add(report)

    def due(self, recorded: int) -> list[WriteManifest]:
        """Orders for the checkpoints whose parts are whole and whose step is on record (``recorded`` is the
        newest that is): a run that goes on from a checkpoint has no gap in its log."""
        orders: list[WriteManifest] = []
        for (version, _), parts in sorted(self._parts.items()):
            if version in self._writing or version > recorded:
                continue
            if parts.elements < self._wanted:
                continue  # spares most reports of a large run the closer look
            files = tuple(
                sorted((part.file for part in parts.by_worker.values()), key=lambda file: file.name)
            )
            if covers(self.layout, (piece for file in files for piece in file.pieces)):
                self._writing.add(version)
                orders.append(WriteManifest(version, next(iter(parts.by_worker.values())).exponents, files))
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


def _elements(part: Written) -> int:
    return sum(stop - start for _, start, stop in part.file.pieces)


def covers(layout: Layout, pieces: Iterable[tuple[int, int, int]]) -> bool:
    """Whether the pieces (block, start, stop) together cover every block."""
    reached: dict[int, int] = {}
    for block, start, stop in sorted(pieces):
        if start <= reached.get(block, 0):
            reached[block] = max(stop, reached.get(block, 0))
    return all(reached.get(block.index, 0) >= block.size for block in layout.blocks)
