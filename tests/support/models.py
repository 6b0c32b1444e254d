"""Small models and data for tests: fast, with a tie, dropout and every kind of boundary value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Embed(nn.Module):
    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.dropout(self.table(tokens_BT))


class Mix(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        mixed_BTD = self.norm(x_BTD).cumsum(1) / 4
        return x_BTD + self.dropout(self.down(F.gelu(self.up(mixed_BTD))))


class Head(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.linear(x_BTD, self.weight)


def loss(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, int]:
    summed = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum")
    return summed, targets_BT.numel()


def build(
    vocabulary: int = 37, width: int = 24, depth: int = 3, dropout: float = 0.2
) -> tuple[list[nn.Module], Any]:
    """A tied toy language model of ``depth`` + 2 layers."""
    embed = Embed(vocabulary, width, dropout)
    layers: list[nn.Module] = [embed, *(Mix(width, dropout) for _ in range(depth))]
    layers.append(Head(embed.table.weight))
    return layers, loss


class Tokens:
    """Random tokens: pure functions of (seed, step, micro-batch)."""

    def __init__(self, seed: int, micro_batch_size: int = 2, length: int = 5, vocabulary: int = 37) -> None:
        self._seed, self._shape, self._vocabulary = seed, (micro_batch_size, length), vocabulary

    def _tokens(self, *place: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(hash((self._seed, *place)) % (1 << 31))
        tokens = torch.randint(self._vocabulary, self._shape, generator=generator)
        return tokens, (tokens * 3 + 1) % self._vocabulary

    def micro_batch(self, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        return self._tokens(0, step, micro_batch)

    def held_out(self, micro_batch: int) -> tuple[Tensor, Tensor]:
        return self._tokens(1, 0, micro_batch)
