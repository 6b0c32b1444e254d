"""What a picture is like, without anything learned: outlines, colours and a thumbnail as one vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIRECTIONS, LEVELS = 9, 4
OUTLINE_GRIDS, COLOUR_GRIDS, THUMBNAIL = (2, 4, 8), (1, 2), 8


GAIN = 20.0
"""Adam's steps have a size of their own: this makes those of the weights of features below 1 large enough."""


class Descriptor(nn.Module):
    """``N C y x`` (0 to 1, and 0 is nothing) to ``N features``: how strong edges of each direction are in
    the cells of a few grids (Dalal and Triggs, "Histograms of Oriented Gradients for Human Detection", 2005),
    how frequent colours are in them (Swain and Ballard, "Color Indexing", 1991), and the picture in small.

    From some hundred pictures, what convolutions learn tells less of the next one. Each part is a vector of
    about unit length; of shares the roots are taken, so that differences of small ones count too. Values
    spread over neighbouring bins, so that nothing jumps where a picture hardly changes.
    """

    size = (
        DIRECTIONS * sum(grid**2 for grid in OUTLINE_GRIDS)
        + LEVELS**3 * sum(grid**2 for grid in COLOUR_GRIDS)
        + 3 * THUMBNAIL**2
    )
    directions_D2: Tensor
    levels_L: Tensor

    def __init__(self) -> None:
        super().__init__()
        # an edge and its opposite are one direction, so that angles are doubled
        angles = [2 * math.pi * number / DIRECTIONS for number in range(DIRECTIONS)]
        directions = torch.tensor([(math.cos(angle), math.sin(angle)) for angle in angles])
        self.register_buffer("directions_D2", directions, persistent=False)
        self.register_buffer("levels_L", torch.arange(LEVELS) / (LEVELS - 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        edges, colours = self._edges(pixels), self._colours(pixels)
        parts = [_shares(F.adaptive_avg_pool2d(edges, grid).flatten(1)) for grid in OUTLINE_GRIDS]
        parts += [_shares(F.adaptive_avg_pool2d(colours, grid).flatten(1)) for grid in COLOUR_GRIDS]
        parts.append(F.adaptive_avg_pool2d(pixels, THUMBNAIL).flatten(1) / (3**0.5 * THUMBNAIL / 2))
        return torch.cat(parts, dim=1)

    def _edges(self, pixels: Tensor) -> Tensor:
        """``N D y x``."""
        grey = F.pad(pixels.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
        down = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
        strength = (across.square() + down.square() + 1e-8).sqrt()
        doubled = torch.cat((across.square() - down.square(), 2 * across * down), dim=1) / strength.square()
        along = torch.einsum("ntyx,dt->ndyx", doubled, self.directions_D2.to(pixels.dtype))
        return along.clamp(min=0).pow(4) * strength

    def _colours(self, pixels: Tensor) -> Tensor:
        """``N L^3 y x``: how much each pixel is of each of the mixtures of the levels of its colours."""
        distance = (pixels[:, :, None] - self.levels_L.to(pixels.dtype)[:, None, None]).abs()
        near = (1 - distance * (LEVELS - 1)).clamp(min=0)
        mixed = near[:, 0, :, None, None] * near[:, 1, None, :, None] * near[:, 2, None, None, :]
        return mixed.flatten(1, 3)


class CategorySight(nn.Module):
    """``N C y x`` (as for ``Descriptor``) to ``N categories``: what a picture makes of each, at first nothing
    (0)."""

    def __init__(self, categories: int) -> None:
        super().__init__()
        self.descriptor = Descriptor()
        self.weight = nn.Parameter(torch.zeros(categories, Descriptor.size))

    def forward(self, pixels: Tensor) -> Tensor:
        return F.linear(GAIN * self.descriptor(pixels), self.weight)


def _shares(parts: Tensor) -> Tensor:
    return (parts / (parts.sum(dim=1, keepdim=True) + 1e-3) + 1e-6).sqrt()
