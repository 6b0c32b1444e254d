"""A model in stages that a micro-batch may skip or pass in another order, and the path of each micro-batch.

Both are part of what a run computes: they follow from the recipe and from the number of the model's layers,
and never from who is there. A change of membership changes which workers hold a stage, and so no bits.

Gradients: every stage sums those of the micro-batches that came by, and the sum is divided by the count of
samples (or tokens) of the whole step, as ever. So the update is that of the gradient of the step's mean
loss, with no factor for how often a stage is passed; nor are activations scaled. The whole model, with every
stage in order, is what is checkpointed and served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from strategies.skippipe.search import Path, search_paths

USUAL_SWAPS = 2
"""Where stages are skipped. Where none is, none comes late: then the bits are those of every other
schedule."""


@dataclass(frozen=True, slots=True)
class Paths:
    """Stage k holds layers ``bounds[k]`` to ``bounds[k + 1] - 1``; the last stage is the end of the model
    (the loss's). ``of[m]``: the stages that micro-batch m of every step passes, in order, from 0 to the
    last."""

    bounds: tuple[int, ...]
    of: tuple[Path, ...]

    @property
    def stages(self) -> int:
        """With the end."""
        return len(self.bounds) - 1

    @property
    def full(self) -> Path:
        """Every stage, in order."""
        return tuple(range(self.stages))

    @property
    def half(self) -> Path:
        """Every other stage, from 0 on, and the end: the model at half its depth, rounded up."""
        return (*range(0, self.stages - 1, 2), self.stages - 1)

    def share(self, stage: int) -> float:
        """Of a step's micro-batches, those that pass ``stage``."""
        return sum(stage in path for path in self.of) / len(self.of)

    def layers_of(self, path: Path) -> tuple[int, ...]:
        """The layers that a micro-batch passes on ``path``, in order."""
        return tuple(layer for stage in path for layer in range(self.bounds[stage], self.bounds[stage + 1]))

    @property
    def joints(self) -> tuple[int, ...]:
        """The layers whose input must be of one form: where a stage begins that is skipped or moved, and the
        end."""
        moved = {stage for path in (*self.of, self.half) for stage in set(self.full) - set(path)}
        moved |= {stage for path in self.of for stage in path if path != tuple(sorted(path))}
        starts = {stage for stage in moved if stage} | {stage + 1 for stage in moved if stage}
        return tuple(self.bounds[stage] for stage in sorted(starts))


def find_paths(layers: int, micro_batches: int, stages: int, taken: int, swaps: int | None = None) -> Paths:
    """Paths of ``taken`` of ``stages``, at most ``swaps`` of them late (None: 2, or 0 where nothing is
    skipped).

    The first layer (the embedding) belongs to stage 0 and the last one is the end by itself; those between
    are divided evenly among stages, but that stage 0, which every micro-batch passes, gets the fewer the
    more the others are skipped: then all have about as much to do. Pure.

    Raises ValueError for a model of too few layers, and as ``search_paths`` does.
    """
    if layers < stages + 2:
        raise ValueError(
            f"{layers} layers are too few for {stages} stages that may be skipped: a model needs two "
            "more than that, the first layer and the last one, which are always passed"
        )
    found = search_paths(stages, taken, micro_batches, swaps_allowed(stages, taken, swaps))
    sizes = _divided(layers - 2, [stage_share(stages, taken), *[1.0] * (stages - 1)])
    bounds = (0, *accumulate([1 + sizes[0], *sizes[1:], 1]))
    return Paths(bounds, tuple((*path, stages) for path in found))


def swaps_allowed(stages: int, taken: int, swaps: int | None) -> int:
    """``swaps``, or what is usual."""
    if swaps is not None:
        return swaps
    return USUAL_SWAPS if taken < stages else 0


def stage_share(stages: int, taken: int) -> float:
    """How long stage 0 is beside the others, so that all have as much to do; at least a tenth."""
    return max((taken - 1) / (stages - 1), 0.1) if stages > 1 else 1.0


def _divided(layers: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers of at least 1 that add up to ``layers``, about as ``weights``; the rest goes to the
    last."""
    sizes = [1] * len(weights)
    for _ in range(layers - len(weights)):
        least = min(reversed(range(len(weights))), key=lambda k: (sizes[k] + 1) / weights[k])
        sizes[least] += 1
    return sizes
