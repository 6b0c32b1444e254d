"""From pixels to patches by convolutions. Shape suffixes as in ``jobs.models.captioner``."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class PatchStem(nn.Module):
    """``N C y x`` to ``N patches D``, each patch seen through convolutions that halve the resolution until a
    position is a patch (Xiao et al., "Early Convolutions Help Transformers See Better", 2021): with few
    images they learn more than one projection of all its pixels would. From the second on, each is followed
    by a residual one at its resolution, of features normed per image (Wu and He, "Group Normalization",
    2018)."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        halvings = patch.bit_length() - 1
        channels = [3, *(max(16, width * number // (halvings + 2)) for number in range(1, halvings + 1))]
        self.halvings = nn.ModuleList(
            nn.Sequential(nn.Conv2d(given, made, 3, stride=2, padding=1), nn.GELU())
            for given, made in pairwise(channels)
        )
        self.residuals = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, made), nn.Conv2d(made, made, 3, padding=1), nn.GELU())
            for made in channels[2:]
        )
        self.out = nn.Conv2d(channels[-1], width, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        features = pixels
        for number, halving in enumerate(self.halvings):
            features = halving(features)
            if number:
                features = features + self.residuals[number - 1](features)
        patches: Tensor = self.out(features)
        return patches.flatten(2).transpose(1, 2)
