"""A captioner that costs next to nothing, for benches of what feeds it: every pixel is read, once.

Shape suffixes as in ``jobs.models.captioner``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.models.gpt import Loss, loss


class Glance(nn.Module):
    """A ``Row`` of data to the vector of each text position: its token's, and what its sample's image looks
    like on the whole."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.colour = nn.Linear(3, width)
        self.weight = nn.Parameter(torch.randn(vocabulary, width))

    def forward(self, row: dict[str, Any]) -> Tensor:
        colour_BKC: Tensor = row["image"].float().mean(dim=(2, 3)) / 255.0
        seen_BKD: Tensor = self.colour(colour_BKC)
        segment_BTD: Tensor = row["segment"].clamp(min=0)[..., None].expand(-1, -1, seen_BKD.shape[-1])
        text_BTD: Tensor = F.embedding(row["tokens"], self.weight)
        return text_BTD + seen_BKD.gather(1, segment_BTD)


def build(*, width: int, vocabulary: int) -> tuple[list[nn.Module], Loss]:
    """Two layers, float32 on the CPU, and the loss of ``jobs.models.gpt``."""
    return [Glance(width, vocabulary), nn.Linear(width, vocabulary)], loss
