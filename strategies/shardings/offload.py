"""Parameters that are in host memory and come to the device layer by layer, as they are needed.

In the manner of Superpipeline (a resident window of k layers, k' of them moved at a time): whoever computes
finds the next move's layers on their way. Any sharding that keeps its parameters whole can be offloaded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Offload:
    """``window`` layers stay on the device, in moves of ``move`` layers. Beside the window one more move is
    there, which comes while the layers before it compute. Raises ValueError where the two do not fit."""

    window: int = 2
    move: int = 1

    def __post_init__(self) -> None:
        if self.move < 1 or self.window < self.move or self.window % self.move:
            raise ValueError(
                f"an offload window of {self.window} layers cannot be moved {self.move} at a time: choose a "
                "window that is a multiple of move, and both at least 1"
            )
