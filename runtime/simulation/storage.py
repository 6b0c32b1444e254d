"""What outlives every process: checkpoints on simulated durable storage, and the run's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runtime.checkpoint import ShardFile
from runtime.events import Event, StepRecord
from runtime.plan import WorkerId
from runtime.protocol import Exponents
from runtime.signals import Durable
from runtime.snapshots import Piece

Values = tuple[int, ...]


@dataclass
class Storage:
    """Files of shards, and manifests that name some of them."""

    _files: dict[str, Mapping[Piece, Values]] = field(default_factory=dict)
    _manifests: dict[int, tuple[str, ...]] = field(default_factory=dict)
    newest: Durable | None = None

    def write(
        self, version: int, worker: WorkerId, generation: int, pieces: Mapping[Piece, Values]
    ) -> ShardFile:
        name = f"{version}-{worker}-{generation}"
        self._files[name] = dict(pieces)
        return ShardFile(name, "", 0, tuple(sorted(pieces)))

    def write_manifest(self, version: int, files: Sequence[ShardFile], exponents: Exponents) -> Durable:
        self._manifests[version] = tuple(file.name for file in files)
        durable = Durable(version, "simulated", exponents)
        if self.newest is None or version > self.newest.version:
            self.newest = durable
        return durable

    def read(self, version: int) -> dict[Piece, Values]:
        return {piece: v for name in self._manifests[version] for piece, v in self._files[name].items()}


@dataclass
class Record:
    """The run folder: what every controller of the run has written down."""

    steps: list[StepRecord] = field(default_factory=list)
    events: list[tuple[float, Event]] = field(default_factory=list)

    @property
    def recorded(self) -> int:
        """The newest step on record."""
        return self.steps[-1].step if self.steps else 0

    def take_back(self, version: int) -> None:
        """Steps after ``version`` will be done again."""
        self.steps = [step for step in self.steps if step.step <= version]
