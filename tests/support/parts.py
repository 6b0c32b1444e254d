"""A worker's part of a model as the theory of shardings has it, without a plan."""

from __future__ import annotations

from collections.abc import Sequence

from strategies.shardings.theory import BlockPart, Part


def even_part(layers: Sequence[float], group: int, micro_batches: float, *, alone: bool = False) -> Part:
    """An average worker's part of a stage of these ``layers`` (elements each, nothing tied) in a stage group
    of ``group``, each of whom computes ``micro_batches`` a step. ``alone``: there is no other worker in the
    whole run, and so no backup."""
    blocks = tuple(
        BlockPart(
            size=size,
            held=True,
            holders=group,
            owned=size / group,
            backed_by_holders=size / group if group > 1 else 0.0,
            backed_elsewhere=size if group == 1 and not alone else 0.0,
            backed_up=0.0 if alone else size / group,
            uses=micro_batches,
            others_uses=micro_batches * (group - 1),
        )
        for size in layers
    )
    return Part(blocks, (tuple(frozenset((place,)) for place in range(len(layers))),))
