"""Toy models whose layers pass more than one tensor on, and data that make a step overflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.models import Tokens, loss


class Split(nn.Module):
    """Tokens -> a dict with every kind of member: float, integer, boolean, plain, and one nobody uses."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.side = nn.Linear(width, width)
        self.unused = nn.Linear(width, 2)

    def forward(self, tokens_BT: Tensor) -> dict[str, Any]:
        x_BTD = self.table(tokens_BT)
        return {
            "x": x_BTD,
            "side": self.side(x_BTD).tanh(),
            "tokens": tokens_BT,
            "even": tokens_BT % 2 == 0,
            "unused": self.unused(x_BTD),
            "scale": 0.5,
            "nothing": None,
        }


class Merge(nn.Module):
    """The dict -> a tuple; one member is passed on as it came."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, value: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        x_BTD, even_BT = value["x"], value["even"]
        masked_BTD = torch.where(even_BT[..., None], self.linear(x_BTD), x_BTD) * value["scale"]
        return self.dropout(masked_BTD), [value["side"], value["tokens"]]


class Join(nn.Module):
    """The tuple -> one tensor; the tokens choose a second embedding."""

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.bias = nn.Embedding(vocabulary, width)
        self.linear = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, value: tuple[Tensor, list[Tensor]]) -> Tensor:
        x_BTD, (side_BTD, tokens_BT) = value
        both_BTE = torch.cat([x_BTD + self.bias(tokens_BT), side_BTD], dim=-1)
        return self.dropout(F.gelu(self.linear(both_BTE)))


def build_values(vocabulary: int = 37, width: int = 24, dropout: float = 0.2) -> tuple[list[nn.Module], Any]:
    """An untied model of 4 layers: dict, tuple with a list in it, tensor, logits."""
    return [
        Split(vocabulary, width),
        Merge(width, dropout),
        Join(vocabulary, width, dropout),
        nn.Linear(width, vocabulary),
    ], loss


def scaled_loss(logits_BTV: Tensor, targets: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """The usual loss times a factor that comes with the data."""
    targets_BT, scale = targets
    summed, count = loss(logits_BTV, targets_BT)
    return summed * scale, count


class Jumping(Tokens):
    """Tokens whose loss is ``factor`` times as large from step ``jump`` on."""

    def __init__(self, seed: int, jump: int, factor: float) -> None:
        super().__init__(seed)
        self._jump, self._factor = jump, factor

    def micro_batch(self, step: int, micro_batch: int) -> tuple[Tensor, Any]:
        inputs, targets = super().micro_batch(step, micro_batch)
        return inputs, (targets, torch.tensor(self._factor if step >= self._jump else 1.0))
