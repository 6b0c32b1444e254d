"""What a worker keeps of a step until the next one begins, so that an interrupted step can go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.salvage import Progress, Status
from strategies.stage import Activation, Gradients

if TYPE_CHECKING:
    from strategies.boundary import Value

Losses = dict[int, tuple[float, int]]
"""Micro-batch -> (summed loss, number of samples or tokens in it)."""


@dataclass
class StepProgress:
    """One worker's micro-batches of one attempt at one step. Outlives plans as long as the step goes on.

    ``keeps`` says whether boundary tensors are kept for others (the worker's own activations are anyway,
    until their backward).
    """

    keeps: bool = True
    step: int = 0
    attempt: int = 0
    layers: tuple[int, int] = (0, 0)
    done: set[int] = field(default_factory=set)
    losses: Losses = field(default_factory=dict)
    in_flight: dict[int, list[Activation]] = field(default_factory=dict)
    paused: dict[int, Gradients] = field(default_factory=dict)
    """Backwards that were interrupted between layers, with the gradient that goes on."""
    values: dict[int, Value] = field(default_factory=dict)
    """Outputs that went to the next stage."""
    gradients: dict[int, Gradients] = field(default_factory=dict)
    """Gradients that went to the stage before."""

    def begin(self, step: int, attempt: int, layers: tuple[int, int]) -> None:
        """Forgets everything."""
        self.step, self.attempt, self.layers = step, attempt, layers
        for kept in (self.done, self.losses, self.in_flight, self.paused, self.values, self.gradients):
            kept.clear()

    def status(self, micro_batch: int) -> Status | None:
        if micro_batch in self.done:
            return Status.DONE
        if micro_batch in self.paused:
            return Status.BACKWARD
        return Status.FORWARD if micro_batch in self.in_flight else None

    def report(self) -> Progress | None:
        """What another plan with the same cut can use; None where that is nothing.

        A further attempt has scales that not everybody may know, so only the first one can go on.
        """
        if not self.keeps or self.attempt != 1:
            return None
        known = sorted({*self.done, *self.paused, *self.in_flight})
        statuses = {micro_batch: self.status(micro_batch) for micro_batch in known}
        first, stop = self.layers
        return Progress(self.step, first, stop, {m: s for m, s in statuses.items() if s is not None})
