"""A trained model's layers as what generation needs: rows of a prompt, decoder blocks, logits.

Shape suffixes: N rows, T positions of a prompt, D width, K half the width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.models.gpt import Block, Embedding, Head
from jobs.serving.cache import KeyValueCache


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an answer is to follow: ``tokens``, at least one."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("the prompt is empty: give at least one token")


class Decoder:
    """A ``jobs.models.gpt`` model in evaluation mode, its parameters frozen.

    Raises ValueError for layers of another kind.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        embedding, *blocks, head = layers
        if not (
            isinstance(embedding, Embedding)
            and isinstance(head, Head)
            and blocks
            and all(isinstance(block, Block) for block in blocks)
        ):
            raise ValueError(
                "this run's model cannot be served: its layers are not those of jobs.models.gpt "
                "(embedding, blocks, head)"
            )
        for layer in layers:
            layer.eval().requires_grad_(False).to(device)
        self.device = device
        self.blocks: list[Block] = [block for block in blocks if isinstance(block, Block)]
        self.context = embedding.context
        self.vocabulary = embedding.weight.shape[0]
        self._embedding, self._head = embedding, head

    def new_cache(self) -> KeyValueCache:
        attention = self.blocks[0].attention
        head_width = attention.qkv.in_features // attention.heads
        return KeyValueCache(len(self.blocks), attention.heads, head_width, self.context, self.device)

    def positions(self, prompt: Prompt) -> int:
        """How many positions a prompt takes."""
        return len(prompt.tokens)

    def prompt_rows(self, prompt: Prompt) -> Tensor:
        """x_TD: what enters the first block."""
        return self.embed(torch.tensor(prompt.tokens, device=self.device))

    def embed(self, tokens_N: Tensor) -> Tensor:
        return F.embedding(tokens_N, self._embedding.weight)

    def angles(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, 1, K] that turn a head's coordinates at these positions."""
        rotary = self.blocks[0].attention.rotary
        return rotary.cos_TK[positions_N, None], rotary.sin_TK[positions_N, None]

    def logits(self, x_ND: Tensor) -> Tensor:
        logits_NV: Tensor = self._head(x_ND)
        return logits_NV
