"""Training with integers instead of tensors: every wrong version, piece or micro-batch changes the result.

A unit stands for ``ALIGNMENT`` elements of a block and all their optimizer state. Its value after a step is
a hash of its value before and of the sum of all micro-batches' gradients, and these are hashes of the
parameters that they were computed with. So a state is right if and only if it equals the reference's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from runtime.layout import ALIGNMENT, Block, Layout
from runtime.resharding import Holding
from runtime.snapshots import Piece

Working = Mapping[int, Sequence[int]]
"""Block -> the values of all its units, as a worker's model has them."""

FINGERPRINT_MODULUS = 1 << 64
LOSS_MODULUS = 1 << 20


def toy_layout(layers: int, units: int, *, tied: bool = False) -> Layout:
    """One block of ``units`` units a layer; ``tied``: one more that the first and last layer share."""
    blocks = [
        Block(layer, f"layer {layer}", (layer,), (), ALIGNMENT * (units + layer % 2))
        for layer in range(layers)
    ]
    if tied and layers > 1:
        blocks.append(Block(layers, "tied", (0, layers - 1), (), ALIGNMENT * units))
    return Layout(layers, tuple(blocks), ())


@dataclass(frozen=True)
class Cut:
    """Stage k holds layers ``bounds[k]`` to ``bounds[k + 1] - 1``; ``paths`` as in ``Plan``."""

    bounds: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ToyModel:
    """The arithmetic of a step, as pure functions. With a ``cut`` micro-batches pass only some layers."""

    layout: Layout
    micro_batches: int
    cut: Cut | None = None

    def order(self, micro_batch: int) -> tuple[int, ...]:
        """The layers that ``micro_batch`` passes."""
        if self.cut is None:
            return tuple(range(self.layout.layers))
        bounds = self.cut.bounds
        return tuple(layer for k in self.cut.paths[micro_batch] for layer in range(bounds[k], bounds[k + 1]))

    def forward(self, layer: int, value: int, working: Working) -> int:
        return hash((value, layer, *(tuple(working[b.index]) for b in self._blocks(layer))))

    def backward(self, layer: int, value: int, gradient: int, working: Working) -> tuple[int, dict[int, int]]:
        """(gradient of the input ``value``, block -> gradient of its parameters)."""
        own = hash((value, gradient, layer, *(tuple(working[b.index]) for b in self._blocks(layer))))
        return own, {block.index: hash((own, block.index)) for block in self._blocks(layer)}

    def updated(self, value: int, total: int, unit: int) -> int:
        return hash((value, total, unit))

    def loss(self, value: int) -> int:
        return value % LOSS_MODULUS

    def outgrows(self, step: int) -> bool:
        """Whether a gradient of ``step`` outgrows the scale chosen before it, so that all repeat it."""
        return hash((step, 77)) % 7 == 0

    def _blocks(self, layer: int) -> tuple[Block, ...]:
        return self.layout.blocks_of(layer, layer + 1)


State = tuple[tuple[int, ...], ...]
"""By block and unit."""


class Reference:
    """What an undisturbed run of ``model`` computes, as far as it was asked for."""

    def __init__(self, model: ToyModel) -> None:
        self.model = model
        first = tuple(
            tuple(hash((block.index, unit)) for unit in range(block.size // ALIGNMENT))
            for block in model.layout.blocks
        )
        self._states: list[State] = [first]
        self._losses: list[int] = [0]

    def state(self, version: int) -> State:
        while len(self._states) <= version:
            self._step()
        return self._states[version]

    def piece(self, piece: Piece, version: int) -> tuple[int, ...]:
        block, start, stop = piece
        return self.state(version)[block][start // ALIGNMENT : stop // ALIGNMENT]

    def fingerprint(self, version: int) -> int:
        return sum(sum(units) for units in self.state(version)) % FINGERPRINT_MODULUS

    def loss(self, step: int) -> float:
        """The mean over the micro-batches of ``step``."""
        self.state(step)
        return self._losses[step] / self.model.micro_batches

    def _step(self) -> None:
        model, working = self.model, dict(enumerate(self._states[-1]))
        step = len(self._states)
        totals = dict.fromkeys(working, 0)
        loss = 0
        for micro_batch in range(model.micro_batches):
            values, order = [sample(step, micro_batch)], model.order(micro_batch)
            for layer in order:
                values.append(model.forward(layer, values[-1], working))
            loss += model.loss(values[-1])
            gradient = values[-1]
            for layer, value in zip(reversed(order), reversed(values[:-1]), strict=True):
                gradient, parts = model.backward(layer, value, gradient, working)
                for block, part in parts.items():
                    totals[block] += part
        self._losses.append(loss)
        self._states.append(
            tuple(
                tuple(model.updated(value, totals[block], unit) for unit, value in enumerate(units))
                for block, units in working.items()
            )
        )


@lru_cache(maxsize=64)
def reference(model: ToyModel) -> Reference:
    """One for all runs of the same model."""
    return Reference(model)


def sample(step: int, micro_batch: int) -> int:
    """The data: a pure function, as everywhere."""
    return hash((step, micro_batch))


class ToyStage:
    """The layers that a worker holds; see ``strategies.stage.StageModel``."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.held: tuple[tuple[int, int], ...] = ()
        self.working: dict[int, list[int]] = {}
        self.version: dict[int, int | None] = {}
        self.accumulators: dict[int, int] = {}

    def hold(self, *stages: tuple[int, int]) -> None:
        """Holds other layers from now on: blocks that stay keep their contents, new ones are undefined."""
        wanted = {block.index: block for stage in stages for block in self.layout.blocks_of(*stage)}
        self.working = {
            index: self.working.get(index) or [0] * (block.size // ALIGNMENT)
            for index, block in wanted.items()
        }
        self.version = {index: self.version.get(index) for index in wanted}
        self.held = stages

    def clear_gradients(self) -> None:
        self.accumulators = dict.fromkeys(self.working, 0)

    def write(self, block: int, start: int, values: Sequence[int]) -> None:
        unit = start // ALIGNMENT
        self.working[block][unit : unit + len(values)] = values

    def read(self, block: int, start: int, stop: int) -> tuple[int, ...]:
        return tuple(self.working[block][start // ALIGNMENT : stop // ALIGNMENT])


class ToyStore:
    """The versions of shard state that a worker keeps; see ``runtime.snapshots.ShardStore``.

    What is put in must equal the reference: AssertionError otherwise.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._pieces: dict[Piece, dict[int, tuple[int, ...]]] = {}

    def put(self, piece: Piece, version: int, values: Sequence[int]) -> None:
        kept = tuple(values)
        assert kept == self._reference.piece(piece, version), f"wrong state of {piece} at version {version}"
        self._pieces.setdefault(piece, {})[version] = kept

    def get(self, piece: Piece, version: int) -> tuple[int, ...] | None:
        return self._pieces.get(piece, {}).get(version)

    def parts(self, piece: Piece, version: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """(start, stop, values) of whatever parts of ``piece`` are kept, possibly overlapping."""
        block, start, stop = piece
        for (owner, begin, end), versions in self._pieces.items():
            low, high = max(begin, start), min(end, stop)
            if owner == block and version in versions and low < high:
                first = (low - begin) // ALIGNMENT
                yield low, high, versions[version][first : first + (high - low) // ALIGNMENT]

    def read(self, piece: Piece, version: int) -> tuple[int, ...] | None:
        """Any interval, put together from what is kept of it; None where a part is missing."""
        _, start, stop = piece
        values: list[int | None] = [None] * ((stop - start) // ALIGNMENT)
        for low, high, part in self.parts(piece, version):
            values[(low - start) // ALIGNMENT : (high - start) // ALIGNMENT] = part
        found = tuple(value for value in values if value is not None)
        return found if len(found) == len(values) else None

    def drop(self, *, before: int = 0, after: int | None = None) -> None:
        for piece, versions in list(self._pieces.items()):
            for version in [v for v in versions if v < before or (after is not None and v > after)]:
                del versions[version]
            if not versions:
                del self._pieces[piece]

    def clear(self) -> None:
        self._pieces.clear()

    def holdings(self) -> tuple[Holding, ...]:
        return tuple(
            Holding(block, start, stop, version)
            for (block, start, stop), versions in sorted(self._pieces.items())
            for version in sorted(versions)
        )
