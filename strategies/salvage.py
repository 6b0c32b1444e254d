"""What a worker keeps of a step until the next one begins, so that an interrupted step can go on."""

from __future__ import annotations

import runtime.salvage
from strategies.boundary import Value
from strategies.stage import Activation, Gradients

Loss = tuple[float, int]
"""Summed loss, number of samples or tokens in it."""

Losses = dict[int, Loss]
"""By micro-batch."""

StepProgress = runtime.salvage.StepProgress[list[Activation], Gradients, Value, Loss]
