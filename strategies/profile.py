"""What a worker's warm-up found out about the layers (``warm_up``), as planners read it."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.sequence.sharing import Sharing


@dataclass(frozen=True)
class Profile:
    """Seconds per micro-batch of each layer, and the bytes that each layer hands to the next. ``flops``: what
    each layer computes for a micro-batch, forward and backward, without what is computed again; None where
    it cannot be counted. Where it was asked for in detail: ``kept_bytes`` and ``split_seconds`` (input
    gradient, weight gradient) of each layer as in ``anatomy``, and the bytes of the first layer's input; and
    how teams divide each layer, if all of them can be."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    boundary_bytes: tuple[int, ...]
    flops: tuple[int, ...] | None = None
    kept_bytes: tuple[int, ...] = ()
    split_seconds: tuple[tuple[float, float], ...] = ()
    entry_bytes: int = 0
    sharing: tuple[Sharing, ...] = ()
