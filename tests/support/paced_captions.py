"""Drawn captions that take time to be read, for runs on Ray that last as long as a test needs them."""

from __future__ import annotations

import time
from typing import Any

from jobs.data.multimodal import MultimodalData
from jobs.data.multimodal import build as build_captions
from runtime.samples import Read


class PacedCaptions(MultimodalData):
    """Reading inputs takes time, and leaves the processor to others."""

    seconds = 0.0

    def inputs(self, step: int, micro_batch: int) -> Read:
        time.sleep(self.seconds)
        return super().inputs(step, micro_batch)


def build_paced_captions(seconds: float, **arguments: Any) -> PacedCaptions:
    """The recipe's data builder on a curated set."""
    data = build_captions(**arguments)
    data.__class__ = PacedCaptions
    assert isinstance(data, PacedCaptions)
    data.seconds = seconds
    return data
