"""How a layer's seconds divide between what is done slice by slice and what is done head by head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from strategies.sequence.phases import Space, phases_of
from strategies.sequence.sharing import Sharing

RUNS = 2
"""The faster one counts."""


def sharing_of(layer: nn.Module, inputs: Sequence[Tensor], lap: Callable[[], float]) -> Sharing | None:
    """By ``RUNS`` forwards, phase by phase; None for a layer that does not say how it can be divided.
    ``lap``: the seconds since it was last called. ``inputs`` are ``B T ...``."""
    phases = phases_of(layer)
    if phases is None:
        return None
    best = (0.0, 0.0)
    exchanged: dict[str, int] = {}
    for run in range(RUNS):
        known: dict[tuple[str, Space], list[Tensor]] = {
            (name, Space.SLICES): [tensor] for name, tensor in zip(phases.inputs, inputs, strict=True)
        }
        seconds = dict.fromkeys(Space, 0.0)
        for phase in phases.steps:
            for name in phase.reads:
                if (name, phase.space) in known:
                    continue
                parts = known[name, phases.home[name]]
                exchanged[name] = sum(part.nbytes for part in parts)
                to_heads = phase.space is Space.HEADS
                known[name, phase.space] = (
                    list(parts[0].unbind(2)) if to_heads else [torch.stack(parts, dim=2)]
                )
            lap()
            made = [
                phase.run(*(known[name, phase.space][part] for name in phase.reads))
                for part in range(phase.parts if phase.space is Space.HEADS else 1)
            ]
            seconds[phase.space] += lap()
            for name, tensors in zip(phase.writes, zip(*made, strict=True), strict=True):
                known[name, phase.space] = list(tensors)
        taken = (sum(seconds.values()), seconds[Space.HEADS])
        best = taken if run == 0 else min(best, taken)
    heads = [phase.parts for phase in phases.steps if phase.space is Space.HEADS]
    return Sharing(
        heads=min(heads, default=0),
        head_share=best[1] / best[0] if best[0] > 0 else 0.0,
        exchanges=len(exchanged),
        exchanged_bytes=sum(exchanged.values()),
    )
