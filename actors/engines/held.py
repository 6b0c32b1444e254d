"""The full float32 parameters that a worker has in host memory while its engine is being made."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.layout import Layout
from runtime.pulse import Pulse
from strategies.options import WHOLE, Keeps
from strategies.residence import Residence
from strategies.stage import Layers, LayerTimes


class HostParameters:
    """What ``strategies.move.Mover`` fills, in place of a stage's own working parameters.

    They are there from a change of membership until the engine has taken them in. Where a plan begins at a
    step boundary they are gathered before it.
    """

    def __init__(self, layout: Layout, pulse: Pulse) -> None:
        self.layout = layout
        self.pulse = pulse
        self.working: dict[int, Tensor] = {}
        self.version: dict[int, int | None] = {}
        self.accumulators: dict[int, Tensor] = {}
        self.residence: Residence | None = None

    def hold(self, *stages: Layers, keeps: Keeps | None = None) -> None:
        """Makes room for the blocks of the layers of ``stages``; contents are uninitialised."""
        assert keeps in (None, WHOLE), "an engine shards by itself"
        for block in [block for stage in stages for block in self.layout.blocks_of(*stage)]:
            if block.index not in self.working:
                self.working[block.index] = torch.empty(block.size)
                self.version[block.index] = None

    def release(self) -> None:
        """The engine has them now."""
        self.working.clear()
        self.version.clear()

    def take_times(self) -> LayerTimes:
        """Layers are not timed inside an engine."""
        return LayerTimes()
