"""The GPT with ladder residuals: a block's MLP does not wait for its attention, nor that for the MLP before.

Every module reads the residual stream as it was before the module ahead of it, whose output is added
afterwards (Zhang et al., "Ladder-Residual: Parallelism-Aware Architecture for Accelerating Large Model
Inference with Communication Overlapping", 2025). What a module has to send is on its way while the next one
computes. There it is the all-reduce of tensor parallelism; here the attention's two all-to-alls: the first
hides behind the first half of the MLP, the second behind the second half, and backward likewise.

Between blocks passes a pair: the stream, and the last MLP's output that is not in it yet.
Shape suffixes as in ``jobs.models.gpt``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.models.gpt import Block
from strategies.sequence.phases import Phase, Phases, Space

Pair = tuple[Tensor, Tensor]


class LadderBlock(Block):
    """One block, ``(stream_BTD, pending_BTD)`` to the same. The ``first`` one takes the stream alone."""

    def __init__(
        self, width: int, heads: int, context: int, dropout: float, expansion: int, *, first: bool
    ) -> None:
        super().__init__(width, heads, context, dropout, expansion)
        self.first = first

    def forward(self, value: Tensor | Pair) -> Pair:  # type: ignore[override]
        stream_BTD, *pending = (value,) if isinstance(value, Tensor) else value
        attended_BTD = self.attention(self.attention_norm(stream_BTD))
        stream_BTD, hidden_BTE = self._widen(stream_BTD, *pending)
        return stream_BTD + self.dropout(attended_BTD), *self._narrow(hidden_BTE)

    def phases(self) -> Phases:
        """See ``strategies.sequence``: between the attention's three phases lie the halves of the MLP."""
        inputs = ("x",) if self.first else ("x", "pending")
        steps = (
            Phase(Space.SLICES, self._project, ("x",), ("qkv",)),
            Phase(Space.SLICES, self._widen, inputs, ("stream", "hidden")),
            Phase(Space.HEADS, self.attention.of_head, ("qkv",), ("attended",), self.attention.heads),
            Phase(Space.SLICES, self._narrow, ("hidden",), ("left",)),
            Phase(Space.SLICES, self._add, ("stream", "attended"), ("y",)),
        )
        return Phases(inputs, ("y", "left"), steps)

    def _widen(self, stream_BTD: Tensor, *pending_BTD: Tensor) -> Pair:
        """The stream with what was pending, and what the MLP's first half makes of it: ``hidden_BTE``."""
        for each_BTD in pending_BTD:
            stream_BTD = stream_BTD + each_BTD
        return stream_BTD, F.gelu(self.mlp_in(self.mlp_norm(stream_BTD)))

    def _narrow(self, hidden_BTE: Tensor) -> tuple[Tensor]:
        return (self.dropout(self.mlp_out(hidden_BTE)),)

    def _add(self, stream_BTD: Tensor, attended_BTHK: Tensor) -> tuple[Tensor]:
        return (stream_BTD + self.dropout(self.attention.out(attended_BTHK.flatten(2))),)


class LadderHead(nn.Module):
    """Final norm and output projection of a pair, to ``logits_BTV``."""

    def __init__(self, vocabulary: int, width: int, tied_to: nn.Parameter | None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.weight = nn.Parameter(torch.empty(vocabulary, width)) if tied_to is None else tied_to

    def forward(self, pair: Pair) -> Tensor:
        return F.linear(self.norm(pair[0] + pair[1]), self.weight)

    def phases(self) -> Phases:
        """See ``strategies.sequence``."""
        step = Phase(Space.SLICES, lambda *pair: (self.forward(pair),), ("x", "pending"), ("y",))
        return Phases(("x", "pending"), ("y",), (step,))
