"""An image (and speech) captioner as a list of layers: embedding, encoder, bridge, decoder, head.

Patches of the image (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, section 3.1) and, where there
is audio, patches of its log-mel spectrogram (Gong et al., "AST", 2021, section 2.1) go through bidirectional
blocks; a decoder then sees them as the prefix of ``[language token, caption...]``. Several samples share a
row (packing): attention stays within a sample, so that each has the loss it would have alone.

Shape suffixes: B rows, K slots of a row (one sample each), T text positions of a row, P image patches,
A audio patches, M = P + A media tokens of a sample, S = K M + T decoder positions, D width, V vocabulary,
H heads, N samples of a clip, C channels; images are pixels y, x, C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.data.curated import open_set
from jobs.models.descriptor import CategorySight
from jobs.models.gpt import Block, Head, Loss, Rotary, check_sizes, loss
from jobs.models.log_mel import LogMel
from jobs.models.patch_stem import PatchStem

Row = dict[str, Any]
"""What flows between layers. Into the first one go ``image`` (uint8 B K y x C) and ``has_image`` (uint8 B K),
``audio`` (int16 B K N) and ``has_audio`` where the model has the branch, ``category`` (int64 B K, -1 for
none) in the training of a model that learns it, and of the text ``tokens``,
``segment`` (the slot of the sample that a position belongs to, -1 for padding) and ``position`` (within the
sample, from 0), each int64 B T."""


class Embedding(nn.Module):
    """A ``Row`` of data to ``media`` (B K M D) and ``text`` (B T D); ``segment`` and ``position`` pass, with
    ``pass_tokens`` the ``tokens`` too, for a head that looks them up, and with ``categories`` (their number)
    ``seen`` (B K C), how much more or less likely the picture makes each.

    A sample without an image (or a clip) has a learned vector in the place of its patches.
    Raises ValueError for shapes that the model was not built for.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        width: int,
        vocabulary: int,
        context: int,
        dropout: float,
        mel: LogMel | None,
        audio_patches: int,
        mels: int,
        pass_tokens: bool = False,
        categories: int = 0,
    ) -> None:
        super().__init__()
        self.image_size, self.context, self.pass_tokens = image_size, context, pass_tokens
        patches = (image_size // patch) ** 2
        self.stem = PatchStem(patch, width)
        self.image_position = nn.Parameter(torch.empty(patches, width))
        self.no_image = nn.Parameter(torch.empty(width))
        self.mel = mel
        self.audio_patches = audio_patches
        self.clip_samples = 0 if mel is None else audio_patches * AUDIO_PATCH * mel.hop
        if mel is not None:
            self.audio_in = nn.Linear(AUDIO_PATCH * mels, width)
            self.audio_position = nn.Parameter(torch.empty(audio_patches, width))
            self.no_audio = nn.Parameter(torch.empty(width))
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.dropout = nn.Dropout(dropout)
        self.sight = CategorySight(categories) if categories else None

    def forward(self, row: Row) -> Row:
        if row["tokens"].shape[-1] > self.context:
            raise ValueError(
                f"a row has {row['tokens'].shape[-1]} text positions but the model's context is "
                f"{self.context}: raise the model's context or lower the data's"
            )
        media_BKMD = self.image_tokens(row["image"], row["has_image"])
        if self.mel is not None:
            audio_BKAD = self.audio_tokens(row["audio"], row["has_audio"])
            media_BKMD = torch.cat((media_BKMD, audio_BKAD), dim=2)
        return {
            "media": self.dropout(media_BKMD),
            "text": self.dropout(F.embedding(row["tokens"], self.weight)),
            "segment": row["segment"],
            "position": row["position"],
            **({"tokens": row["tokens"]} if self.pass_tokens else {}),
            **({"seen": self.seen(row["image"], row["has_image"])} if self.sight is not None else {}),
            **({"category": row["category"]} if "category" in row else {}),
        }

    def seen(self, image: Tensor, has_image_BK: Tensor) -> Tensor:
        """uint8 ``B K y x C`` to ``B K C``, 0 where there is no image."""
        assert self.sight is not None
        seen_BKC = self.sight(ink(image, self.no_image.dtype)).unflatten(0, image.shape[:2])
        return torch.where(has_image_BK[..., None] > 0, seen_BKC, 0.0)

    def image_tokens(self, image: Tensor, has_image_BK: Tensor) -> Tensor:
        """uint8 ``B K y x C`` to ``B K P D``."""
        size = self.image_size
        if tuple(image.shape[2:]) != (size, size, 3):
            raise ValueError(
                f"an image has shape {tuple(image.shape[2:])} but the model was built for {(size, size, 3)}: "
                "set the model's image_size to that of the data"
            )
        pixels = ink(image, self.no_image.dtype)
        seen_BKPD = self.stem(pixels).unflatten(0, image.shape[:2])
        tokens_BKPD = torch.where(has_image_BK[..., None, None] > 0, seen_BKPD, self.no_image)
        return tokens_BKPD + self.image_position

    def audio_tokens(self, audio_BKN: Tensor, has_audio_BK: Tensor) -> Tensor:
        """int16 ``B K N`` to ``B K A D``."""
        assert self.mel is not None
        if audio_BKN.shape[-1] != self.clip_samples:
            raise ValueError(
                f"a clip has {audio_BKN.shape[-1]} samples but the model was built for {self.clip_samples}: "
                "set the model's audio_rate and audio_seconds to those of the data"
            )
        mels = self.mel(audio_BKN.flatten(0, 1))
        patches = mels.unflatten(1, (self.audio_patches, AUDIO_PATCH)).flatten(2)
        tokens_BKAD = self.audio_in(patches).unflatten(0, audio_BKN.shape[:2])
        tokens_BKAD = torch.where(has_audio_BK[..., None, None] > 0, tokens_BKAD, self.no_audio)
        return tokens_BKAD + self.audio_position


def ink(image: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 ``B K y x C`` to ``N C y x`` from 0 to 1: white, on which all images lie, is nothing."""
    return 1 - image.flatten(0, 1).permute(0, 3, 1, 2).to(dtype) / 255


AUDIO_PATCH = 16
"""Frames (10 ms each) of an audio patch."""


def split_heads(block: Block, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of ``x_BSD`` (already normed), not yet rotated, each ``B H S D/H``."""
    q, k, v = (
        part.unflatten(-1, (block.attention.heads, -1)).transpose(1, 2)
        for part in block.attention.qkv(x_BSD).chunk(3, dim=-1)
    )
    return q, k, v


def rotated(rotary: Rotary, x_BHSK: Tensor, position_BS: Tensor) -> Tensor:
    """As ``rotary`` itself, with the positions given one by one."""
    cos = rotary.cos_TK[position_BS][:, None].to(x_BHSK.dtype)
    sin = rotary.sin_TK[position_BS][:, None].to(x_BHSK.dtype)
    first, second = x_BHSK.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def finish_block(block: Block, x_BSD: Tensor, attended_BHSK: Tensor) -> Tensor:
    """The rest of a block once its attention is computed: projection, residual, MLP."""
    x_BSD = x_BSD + block.dropout(block.attention.out(attended_BHSK.transpose(1, 2).flatten(2)))
    hidden = F.gelu(block.mlp_in(block.mlp_norm(x_BSD)))
    x_BSD = x_BSD + block.dropout(block.mlp_out(hidden))
    return x_BSD


class EncoderBlock(Block):
    """A bidirectional block over the media tokens of each sample by itself; the text passes."""

    def forward(self, row: Row) -> Row:  # type: ignore[override]
        media_BKMD: Tensor = row["media"]
        x = media_BKMD.flatten(0, 1)
        q, k, v = split_heads(self, self.attention_norm(x))
        p = self.attention.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return {**row, "media": finish_block(self, x, attended).view_as(media_BKMD)}


class Bridge(nn.Module):
    """Puts what the decoder sees of all slots' media before the text: ``x`` (B S D) with ``segment`` and
    ``position`` (B S) of every position, and the number ``media`` of those that are no text.

    An image is the mean of its ``patches`` there, one position: from a few hundred pictures, where to look is
    not learned, and rows become shorter. A clip keeps its patches, since words follow each other. A sample's
    language token also gets the mean of its media: what there is to see is known from the start.
    """

    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.patches = patches
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.out = nn.Linear(width, width, bias=False)
        self.summary = nn.Linear(width, width, bias=False)

    def forward(self, row: Row) -> Row:
        media_BKMD: Tensor = self.norm(row["media"])
        device = media_BKMD.device
        image_BKD = media_BKMD[:, :, : self.patches].mean(dim=2, keepdim=True)
        seen_BKMD = torch.cat((image_BKD, media_BKMD[:, :, self.patches :]), dim=2)
        rows, slots, tokens, _ = seen_BKMD.shape
        segment = torch.arange(slots, device=device).repeat_interleave(tokens).expand(rows, -1)
        position = torch.arange(tokens, device=device).repeat(slots).expand(rows, -1)
        places_K = torch.arange(slots, device=device)
        begins_BTK = (row["segment"][..., None] == places_K) & (row["position"][..., None] == 0)
        summary_BKD = self.summary(media_BKMD.mean(dim=2))
        text_BTD = row["text"] + torch.matmul(begins_BTK.to(summary_BKD.dtype), summary_BKD)
        return {
            "x": torch.cat((self.out(seen_BKMD).flatten(1, 2), text_BTD), dim=1),
            "segment": torch.cat((segment, row["segment"]), dim=1),
            "position": torch.cat((position, row["position"] + tokens), dim=1),
            "media": slots * tokens,
            **{name: row[name] for name in ("tokens", "seen", "category") if name in row},
        }


def attention_mask(segment_BS: Tensor, position_BS: Tensor, media_tokens: int) -> Tensor:
    """bool ``B S S`` (query, key): within a sample, text looks back and everything sees all of the media."""
    same = segment_BS[:, :, None] == segment_BS[:, None, :]
    places = torch.arange(segment_BS.shape[1], device=segment_BS.device)
    back = places[None, :] <= places[:, None]
    return same & (back | (position_BS[:, None, :] < media_tokens))


class DecoderBlock(Block):
    """A block over whole rows, whose attention stays within samples."""

    def __init__(
        self, width: int, heads: int, context: int, dropout: float, expansion: int, media_tokens: int
    ) -> None:
        super().__init__(width, heads, media_tokens + context, dropout, expansion)
        self.media_tokens = media_tokens

    def forward(self, row: Row) -> Row:  # type: ignore[override]
        x_BSD, position_BS = row["x"], row["position"]
        q, k, v = split_heads(self, self.attention_norm(x_BSD))
        mask = attention_mask(row["segment"], position_BS, self.media_tokens)
        attended = F.scaled_dot_product_attention(
            rotated(self.attention.rotary, q, position_BS),
            rotated(self.attention.rotary, k, position_BS),
            v,
            attn_mask=mask[:, None],
            dropout_p=self.attention.dropout if self.training else 0.0,
        )
        return {**row, "x": finish_block(self, x_BSD, attended)}


class CaptionHead(Head):
    """The text positions' ``logits_BTV``."""

    def forward(self, row: Row) -> Tensor:  # type: ignore[override]
        return super().forward(row["x"][:, row["media"] :])


def build(
    *,
    image_size: int,
    patch: int,
    width: int,
    depth_image: int,
    depth_text: int,
    heads: int,
    vocabulary: int,
    context: int,
    audio: bool = False,
    audio_rate: int = 16_000,
    audio_seconds: float = 4.0,
    mels: int = 64,
    dropout: float = 0.1,
    tied: bool = True,
    expansion: int = 4,
    prior: str | None = None,
    prior_order: int = 3,
    category_weight: float = 0.0,
) -> tuple[list[nn.Module], Loss]:
    """Builds ``depth_image + depth_text + 3`` layers and the loss, all parameters float32 on the CPU.

    ``image_size`` and ``patch`` are in pixels, ``context`` is the number of text positions of a row (all its
    samples together), ``audio_seconds`` the length to which clips are cut or padded. The loss is that of
    ``jobs.models.gpt``: (sum of cross entropies, count of target tokens).

    ``prior`` is the curated set (a path or URI) whose captions the model is trained on: its head then starts
    from their n-gram prior, ``prior_order`` tokens back (``jobs.models.caption_prior``).
    With ``category_weight`` above 0 the model also learns to see a picture's category, and the prior is a
    mixture of those of the categories (``jobs.models.category_prior``): in training, and only there, the data
    tell the categories and the loss has that many times their cross entropies besides.

    Raises ValueError for sizes that do not fit together, or a ``prior`` that is no curated set.
    """
    sizes = {"image_size": image_size, "patch": patch, "width": width, "heads": heads, "mels": mels}
    sizes |= {"depth_image": depth_image, "depth_text": depth_text, "vocabulary": vocabulary}
    sizes |= {"context": context, "expansion": expansion}
    check_sizes(sizes, dropout)
    if patch.bit_count() != 1 or image_size % patch:
        raise ValueError(
            f"the model's patch is {patch} and its image_size {image_size}: choose as patch a power of two "
            "that divides the image_size"
        )
    frames = round(audio_seconds * 100)
    if audio and (frames < AUDIO_PATCH or frames % AUDIO_PATCH or audio_rate % 100):
        raise ValueError(
            f"the model's audio_seconds ({audio_seconds}) and audio_rate ({audio_rate}) do not make whole "
            f"patches: choose multiples of {AUDIO_PATCH / 100} s and of 100 Hz"
        )
    if category_weight < 0 or (category_weight and prior is None):
        raise ValueError(
            f"the model's category_weight is {category_weight}: it must be at least 0, and 0 without a prior"
        )
    audio_patches = frames // AUDIO_PATCH if audio else 0
    patches = (image_size // patch) ** 2
    categories = len(open_set(prior).kinds()[0]) if prior is not None and category_weight else 0
    embedding = Embedding(
        image_size=image_size,
        patch=patch,
        width=width,
        vocabulary=vocabulary,
        context=context,
        dropout=dropout,
        mel=LogMel(audio_rate, mels) if audio else None,
        audio_patches=audio_patches,
        mels=mels,
        pass_tokens=prior is not None,
        categories=categories,
    )
    encoder = [
        EncoderBlock(width, heads, patches + audio_patches, dropout, expansion) for _ in range(depth_image)
    ]
    bridge = Bridge(width, patches)
    decoder = [
        DecoderBlock(width, heads, context, dropout, expansion, 1 + audio_patches) for _ in range(depth_text)
    ]
    tied_to = embedding.weight if tied else None
    head = CaptionHead(vocabulary, width, tied_to)
    criterion: Loss = loss
    if prior is not None:
        from jobs.models.category_prior import prior_head  # whose head is made of ours

        head, criterion = prior_head(
            prior, prior_order, category_weight, vocabulary, width, tied_to, 1 + audio_patches
        )
    _initialise(embedding, encoder, bridge, decoder, head, tied)
    return [embedding, *encoder, bridge, *decoder, head], criterion


def _initialise(
    embedding: Embedding,
    encoder: list[EncoderBlock],
    bridge: Bridge,
    decoder: list[DecoderBlock],
    head: CaptionHead,
    tied: bool,
) -> None:
    """As the GPT's; the patches' projections keep their variance, so that the image counts from the start."""
    deviation = 0.02
    for name, parameter in embedding.named_parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        elif name.startswith("no_") or name.endswith("_position"):
            # as large as what they are added to: a norm then tells a pale patch from a strong one
            nn.init.normal_(parameter, std=0.5)
        elif name.endswith("_in.weight"):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif name.endswith(".bias") or name.startswith("sight"):
            nn.init.zeros_(parameter)
        elif name.startswith("stem") and parameter.ndim == 1:
            nn.init.ones_(parameter)  # of a norm
        else:
            nn.init.normal_(parameter, std=deviation)
    for blocks in (encoder, decoder):
        residual = deviation / (2 * len(blocks)) ** 0.5
        for block in blocks:
            nn.init.normal_(block.attention.qkv.weight, std=deviation)
            nn.init.normal_(block.attention.out.weight, std=residual)
            nn.init.normal_(block.mlp_in.weight, std=deviation)
            nn.init.normal_(block.mlp_out.weight, std=residual)
    scale = bridge.out.in_features**-0.5
    nn.init.normal_(bridge.out.weight, std=scale)
    nn.init.normal_(bridge.summary.weight, std=deviation * scale)  # no louder than the language itself
    if not tied:
        nn.init.normal_(head.weight, std=deviation)
