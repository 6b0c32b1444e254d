"""From sound to log-mel energies. Shape suffixes as in ``jobs.models.captioner``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LogMel(nn.Module):
    """``audio_BN`` (int16) to log-mel energies, float32 ``B, frames, mels``, around 0 and of unit order.

    Windows of 25 ms every 10 ms, triangular filters evenly spaced on the mel scale of O'Shaughnessy ("Speech
    Communication", 1987): m = 2595 log10(1 + f / 700). The tables are constants, in no state dict.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, rate: int, mels: int) -> None:
        super().__init__()
        self.hop = rate // 100
        self.size = 1 << (rate // 40 - 1).bit_length()
        self.register_buffer("window", torch.hann_window(rate // 40), persistent=False)
        frequencies = torch.linspace(0, rate / 2, self.size // 2 + 1, dtype=torch.float64)
        top = 2595 * math.log10(1 + rate / 2 / 700)
        edges = 700 * (10 ** (torch.linspace(0, top, mels + 2, dtype=torch.float64) / 2595) - 1)
        rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
        falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
        self.register_buffer("filters", torch.minimum(rising, falling).clamp(min=0).float(), persistent=False)

    def forward(self, audio_BN: Tensor) -> Tensor:
        spectrum = torch.stft(
            audio_BN.float() / 32768,
            self.size,
            self.hop,
            win_length=self.window.numel(),
            window=self.window,
            return_complex=True,
        )
        energies = torch.matmul(self.filters, spectrum.abs().square())[..., :-1]
        return (energies.clamp(min=1e-8).log10().transpose(1, 2) + 4) / 4
