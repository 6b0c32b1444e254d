"""What a job may choose of how it is computed and kept, as plain values.

Nothing here imports PyTorch: the controller, which plans by these values and computes nothing, needs none.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """What AdamW needs. Raises ValueError where a value makes no sense.

    The rate rises linearly over ``warmup_steps`` to ``learning_rate`` and then falls along a
    cosine to ``minimum_rate * learning_rate`` at step ``decay_steps``, where it stays; with
    ``decay_steps`` None it stays at ``learning_rate``. ``clip_norm`` None: no clipping.
    """

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 0
    decay_steps: int | None = None
    minimum_rate: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.learning_rate >= 0 or not self.eps > 0 or not self.weight_decay >= 0:
            raise ValueError("learning_rate and weight_decay must not be negative, eps must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        if not 0 <= self.minimum_rate <= 1:
            raise ValueError("minimum_rate is a share of learning_rate: choose 0 to 1")
        if self.warmup_steps < 0 or (self.decay_steps is not None and self.decay_steps < self.warmup_steps):
            raise ValueError("warmup_steps must not be negative, nor exceed decay_steps")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError("clip_norm must be positive; leave it out for no clipping")

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, counted from 1."""
        assert step >= 1, "steps count from 1"
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.decay_steps is None:
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.decay_steps - self.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * (self.minimum_rate + (1.0 - self.minimum_rate) * cosine)


@dataclass(frozen=True)
class Precision:
    """``recompute`` lists the layers whose activations are computed again in backward."""

    autocast: bool = False
    recompute: Collection[int] = ()


@dataclass(frozen=True)
class Keeps:
    """What a stage has in memory all the time: the held layers' ``parameters``, and ``sums`` of all of their
    gradients. With ``streams`` the layers compute with parameters that come and go (``residence``)."""

    parameters: bool = True
    sums: bool = True
    streams: bool = False

    @property
    def offloads(self) -> bool:
        """Whether what is kept is not where the layers compute, but in host memory."""
        return self.streams and self.parameters


WHOLE = Keeps()


@dataclass(frozen=True, slots=True)
class Offload:
    """``window`` layers stay on the device, in moves of ``move`` layers. Beside the window one more move is
    there, which comes while the layers before it compute. Raises ValueError where the two do not fit."""

    window: int = 2
    move: int = 1

    def __post_init__(self) -> None:
        if self.move < 1 or self.window < self.move or self.window % self.move:
            raise ValueError(
                f"has a window of {self.window} layers, which cannot be moved {self.move} at a time: choose "
                "a window that is a multiple of move, and both at least 1"
            )
