"""What a recipe may say of teams that share micro-batches, beside its other sections."""

from __future__ import annotations

from typing import Literal

from jobs.recipe.choices import AUTO
from strategies.shardings.registry import SHARDINGS


def check_sequence(
    sequence: int | Literal["auto"], slices: int, sharding: str, engine: str, *, offloads: bool
) -> None:
    """Raises ValueError, one sentence, for what cannot be together."""
    if sequence == AUTO and slices == 1:
        raise ValueError(
            'parallel.sequence = "auto" leaves open how a sequence is cut, on which the bits depend: set '
            "parallel.sequence_slices to at least 2."
        )
    if isinstance(sequence, int) and slices < sequence:
        raise ValueError(
            f"parallel.sequence_slices ({slices}) is smaller than parallel.sequence ({sequence}): every "
            "worker of a team needs a slice, so raise sequence_slices or lower sequence."
        )
    if slices == 1:
        return
    if engine != "reknit":
        raise ValueError(
            f"parallel.sequence has no meaning with engine.name = {engine!r}: remove parallel.sequence and "
            "parallel.sequence_slices."
        )
    whole = [name for name, entry in SHARDINGS.items() if entry.salvages]
    if sharding not in (*whole, AUTO) or offloads:
        raise ValueError(
            "parallel.sequence needs workers that keep all parameters and sums of their stage: set "
            f"parallel.sharding to {' or '.join(whole)} without parallel.offload, or remove "
            "parallel.sequence and parallel.sequence_slices."
        )
