"""What may be chosen: every strategy, number of stages and way to share out the workers that is weighed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from runtime.plan import Strategy
from strategies.planning.partition import MOST_STAGES
from strategies.search.formulas import FORMULAS
from strategies.search.memory import SHARDINGS
from strategies.shardings.registry import DEFAULT
from strategies.shardings.registry import SHARDINGS as REGISTRY


@dataclass(frozen=True, slots=True)
class Space:
    """``stages`` None: 1 to ``MOST_STAGES``. ``chunks`` None: as many as each schedule has a use for.
    ``recompute`` None: whichever layers must be for the rest to fit into memory. ``offloads``: (window, move)
    of layers on the device, None: parameters are not in host memory.
    """

    stages: tuple[int, ...] | None = None
    schedules: tuple[str, ...] = tuple(FORMULAS)
    chunks: int | None = None
    shardings: tuple[str, ...] = (DEFAULT,)
    sequences: tuple[int, ...] = (1,)
    offloads: tuple[tuple[int, int] | None, ...] = (None,)
    recompute: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for kind, known, names in (
            ("schedule", FORMULAS, self.schedules),
            ("sharding", SHARDINGS, self.shardings),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(
                        f"{name!r} is no {kind} that can be searched for: choose from {', '.join(known)}"
                    )


@dataclass(frozen=True, slots=True, eq=False)
class Combination:
    """All that is chosen but where the layers are cut and which of them are recomputed. ``sizes`` are the
    stage groups' workers, each of which holds ``strategy.chunks`` stages, in turn; ``strategy.recompute`` is
    empty where it is to be found."""

    strategy: Strategy
    sizes: tuple[int, ...]

    @property
    def stages(self) -> int:
        return len(self.sizes) * self.strategy.chunks

    def size(self, stage: int) -> int:
        """The workers of the group that holds ``stage``."""
        return self.sizes[stage % len(self.sizes)]

    def recomputing(self, layers: tuple[int, ...]) -> Strategy:
        return replace(self.strategy, recompute=layers)


def combinations(space: Space, workers: int, layers: int, micro_batches: int) -> Iterator[Combination]:
    """All of them that so many workers can do, in a fixed order.

    Groups have as many workers as each other or one more, the larger ones first or last. With one stage
    every schedule is the same, and the first is taken.
    """
    counts = space.stages or tuple(range(1, MOST_STAGES + 1))
    for count in dict.fromkeys(min(count, workers, layers) for count in counts):
        schedules = [name for name in space.schedules if count > 1 or FORMULAS[name].chunks == (1,)]
        for schedule in schedules if count > 1 else (schedules or list(space.schedules))[:1]:
            for chunks in FORMULAS[schedule].chunks if space.chunks is None else (space.chunks,):
                if count * chunks > layers:
                    continue
                for sizes in _sizes(workers, count):
                    unlike = {*sizes}
                    whole = [each for each in space.sequences if not any(size % each for size in unlike)]
                    for sharding in space.shardings:
                        for sequence in whole:
                            for offload in space.offloads:
                                if _may_be(sharding, sequence, offload):
                                    strategy = Strategy(schedule, chunks, sharding, sequence, (), offload)
                                    yield Combination(strategy, sizes)


def _may_be(sharding: str, sequence: int, offload: tuple[int, int] | None) -> bool:
    """Teams need workers that keep all parameters and sums, and what is offloaded must be kept."""
    if sequence > 1 and (offload is not None or not REGISTRY[sharding].salvages):
        return False
    return offload is None or REGISTRY[sharding].keeps.parameters


def _sizes(workers: int, count: int) -> tuple[tuple[int, ...], ...]:
    smaller, larger = divmod(workers, count)
    front = tuple(smaller + (k < larger) for k in range(count))
    return tuple(dict.fromkeys((front, front[::-1])))
