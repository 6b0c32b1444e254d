"""A trained model's layers as what generation needs: rows of a prompt, decoder blocks, logits.

Shape suffixes: N rows, T positions of a prompt, D width, K half the width of a head, V vocabulary,
C categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.models import captioner, gpt
from jobs.models.caption_prior import PriorHead
from jobs.serving.cache import KeyValueCache
from jobs.serving.generation import Prompt


@dataclass(frozen=True, slots=True)
class Told:
    """What a sequence is, for a head that looks it up: all of its ``tokens``, and what is seen of categories
    in its image (None: nothing is)."""

    tokens: tuple[int, ...]
    seen_C: Tensor | None = None


class Decoder:
    """A decoder-only model in evaluation mode, its parameters frozen. ``prefix`` is the number of media
    positions at the start of every prompt, which all positions see; from there on attention looks back.
    ``reads_texts``: logits are of what went in and of what each sequence is (``Told``).
    """

    prefix = 0
    reads_texts = False

    def __init__(
        self,
        blocks: Sequence[gpt.Block],
        head: gpt.Head,
        weight_VD: Tensor,
        positions: int,
        device: torch.device,
    ) -> None:
        self.blocks, self.device, self.context = list(blocks), device, positions
        self.vocabulary = weight_VD.shape[0]
        self._head, self._weight_VD = head, weight_VD

    def new_cache(self) -> KeyValueCache:
        attention = self.blocks[0].attention
        head_width = attention.qkv.in_features // attention.heads
        return KeyValueCache(len(self.blocks), attention.heads, head_width, self.context, self.device)

    def positions(self, prompt: Prompt) -> int:
        """How many positions a prompt takes."""
        return self.prefix + len(prompt.tokens)

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for what the model does not take."""
        if not all(0 <= token < self.vocabulary for token in prompt.tokens):
            raise ValueError(f"the model knows tokens from 0 to {self.vocabulary - 1} only")
        self._check_media(prompt)

    def prompt_rows(self, prompt: Prompt) -> Tensor:
        """x_TD: what enters the first block."""
        return self.embed(torch.tensor(prompt.tokens, device=self.device))

    def seen(self, prompt: Prompt) -> Tensor | None:
        """What a prompt's image tells beside its rows, for ``Told``."""
        return None

    def embed(self, tokens_N: Tensor) -> Tensor:
        return F.embedding(tokens_N, self._weight_VD)

    def angles(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, 1, K] that turn a head's coordinates at these positions."""
        rotary = self.blocks[0].attention.rotary
        return rotary.cos_TK[positions_N, None], rotary.sin_TK[positions_N, None]

    def logits(self, x_ND: Tensor, texts: Sequence[Told] = ()) -> Tensor:
        """Of the tokens that follow; ``texts``: what came before, for as many of the rows as count."""
        logits_NV: Tensor = F.linear(self._head.norm(x_ND), self._head.weight)
        return logits_NV

    def _check_media(self, prompt: Prompt) -> None:
        if prompt.image is not None or prompt.audio is not None:
            raise ValueError("the model takes text only, no image and no audio")


class CaptionDecoder(Decoder):
    """The decoder of a ``jobs.models.captioner``; its encoder runs once, on the prompt."""

    def __init__(
        self,
        embedding: captioner.Embedding,
        encoder: Sequence[captioner.EncoderBlock],
        bridge: captioner.Bridge,
        blocks: Sequence[captioner.DecoderBlock],
        head: captioner.CaptionHead,
        device: torch.device,
    ) -> None:
        self.prefix = blocks[0].media_tokens
        super().__init__(blocks, head, embedding.weight, self.prefix + embedding.context, device)
        self._embedding, self._encoder, self._bridge = embedding, encoder, bridge
        self.reads_texts = isinstance(head, PriorHead)

    @property
    def image_size(self) -> int:
        return self._embedding.image_size

    @property
    def audio_samples(self) -> int:
        """The length to which clips are cut or padded; 0: the model takes none."""
        mel = self._embedding.mel
        return 0 if mel is None else self._embedding.audio_patches * captioner.AUDIO_PATCH * mel.hop

    def prompt_rows(self, prompt: Prompt) -> Tensor:
        samples = self.audio_samples
        clip = np.zeros(samples, dtype=np.int16)
        if prompt.audio is not None:
            given = np.frombuffer(prompt.audio, dtype=np.int16)[:samples]
            clip[: len(given)] = given
        image, has_image = self._image(prompt)
        row: captioner.Row = {
            "image": image,
            "has_image": has_image,
            "audio": torch.from_numpy(clip)[None, None],
            "has_audio": torch.tensor([[prompt.audio is not None]]),
            "tokens": torch.tensor([prompt.tokens]),
            "segment": torch.zeros(1, len(prompt.tokens), dtype=torch.int64),
            "position": torch.arange(len(prompt.tokens))[None],
        }
        row = self._embedding({name: value.to(self.device) for name, value in row.items()})
        for block in self._encoder:
            row = block(row)
        x_1TD: Tensor = self._bridge(row)["x"]
        return x_1TD[0]

    @torch.no_grad()
    def seen(self, prompt: Prompt) -> Tensor | None:
        if self._embedding.sight is None:
            return None
        image, has_image = self._image(prompt)
        seen_11C = self._embedding.seen(image.to(self.device), has_image.to(self.device))
        return seen_11C[0, 0]

    def _image(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """uint8 [1, 1, size, size, 3], and whether there is one."""
        pixels = np.zeros((self.image_size, self.image_size, 3), dtype=np.uint8)
        if prompt.image is not None:
            pixels = np.frombuffer(prompt.image, dtype=np.uint8).reshape(pixels.shape).copy()
        return torch.from_numpy(pixels)[None, None], torch.tensor([[prompt.image is not None]])

    def logits(self, x_ND: Tensor, texts: Sequence[Told] = ()) -> Tensor:
        logits_NV = super().logits(x_ND).float()
        if isinstance(self._head, PriorHead):
            for row, told in enumerate(texts):
                logits_NV[row] += self._head.prior_after(x_ND[row], told.tokens, told.seen_C)
        return logits_NV

    def _check_media(self, prompt: Prompt) -> None:
        expected = 3 * self.image_size**2
        if prompt.image is not None and len(prompt.image) != expected:
            raise ValueError(f"the image has {len(prompt.image)} bytes, not the {expected} the model takes")
        if prompt.audio is not None and not self.audio_samples:
            raise ValueError("the model takes no audio: it was trained without")


def decoder_of(layers: Sequence[nn.Module], device: torch.device) -> Decoder:
    """The decoder of a model by ``jobs.models.gpt`` or ``jobs.models.captioner``; takes the layers over.

    Raises ValueError for layers of another kind.
    """
    for layer in layers:
        layer.eval().requires_grad_(False).to(device)
    first, *between, last = layers
    if isinstance(first, captioner.Embedding) and isinstance(last, captioner.CaptionHead):
        encoder = [each for each in between if isinstance(each, captioner.EncoderBlock)]
        bridges = [each for each in between if isinstance(each, captioner.Bridge)]
        texts = [each for each in between if isinstance(each, captioner.DecoderBlock)]
        if texts and [*encoder, *bridges[:1], *texts] == between:
            return CaptionDecoder(first, encoder, bridges[0], texts, last, device)
    if isinstance(first, gpt.Embedding) and isinstance(last, gpt.Head):
        blocks = [each for each in between if type(each) is gpt.Block]
        if blocks and blocks == between:
            return Decoder(blocks, last, first.weight, first.context, device)
    raise ValueError(
        "this run's model cannot be served: its layers are neither those of jobs.models.gpt nor those of "
        "jobs.models.captioner"
    )
