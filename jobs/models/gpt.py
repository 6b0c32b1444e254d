"""A decoder-only language model as a list of layers: embedding, blocks, head.

Pre-norm residual blocks (Radford et al., "Language Models are Unsupervised Multitask Learners",
2019, section 2.3), RMS normalisation (Zhang and Sennrich, 2019) and rotary positions (Su et al.,
"RoFormer", 2021, section 3.4). Shape suffixes: B samples, T tokens, D width, V vocabulary,
H heads, K width of a head, E hidden width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from strategies.sequence.phases import Phase, Phases, Space, by_token

if TYPE_CHECKING:
    from jobs.models.ladder import LadderHead

IGNORED = -100
"""A target with this value counts neither in the loss nor among the tokens."""

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Rotary(nn.Module):
    """Turns each pair of a head's coordinates by an angle that grows with the position.

    The inner product of two rotated vectors depends on their distance only. The tables are
    constants: computed once, in no state dict, never written to.
    """

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(self, head_width: int, context: int, base: float = 10_000.0) -> None:
        super().__init__()
        exponents_K = torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
        angles_TK = torch.outer(torch.arange(context, dtype=torch.float64), base**-exponents_K)
        self.register_buffer("cos_TK", angles_TK.cos().float(), persistent=False)
        self.register_buffer("sin_TK", angles_TK.sin().float(), persistent=False)

    def forward(self, x_BHTK: Tensor) -> Tensor:
        tokens = x_BHTK.shape[-2]
        cos_TK = self.cos_TK[:tokens].to(x_BHTK.dtype)
        sin_TK = self.sin_TK[:tokens].to(x_BHTK.dtype)
        first, second = x_BHTK.chunk(2, dim=-1)
        return torch.cat((first * cos_TK - second * sin_TK, first * sin_TK + second * cos_TK), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention, ``x_BTD`` to ``y_BTD``."""

    def __init__(self, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.rotary = Rotary(width // heads, context)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            part_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part_BTD in self.qkv(x_BTD).chunk(3, dim=-1)
        )
        y_BHTK = self.attended(q_BHTK, k_BHTK, v_BHTK)
        y_BTD: Tensor = self.out(y_BHTK.transpose(1, 2).flatten(2))
        return y_BTD

    def of_head(self, qkv_BTK: Tensor) -> tuple[Tensor]:
        """One head's attention over the whole sequence, from its queries, keys and values side by side."""
        q_BHTK, k_BHTK, v_BHTK = (part_BTK.unsqueeze(1) for part_BTK in qkv_BTK.chunk(3, dim=-1))
        return (self.attended(q_BHTK, k_BHTK, v_BHTK).squeeze(1),)

    def attended(self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
        """The values' weighted sums, ``B H T K``; queries and keys come not yet rotated."""
        return F.scaled_dot_product_attention(
            self.rotary(q_BHTK),
            self.rotary(k_BHTK),
            v_BHTK,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )


class Embedding(nn.Module):
    """``tokens_BT`` (int64, below ``vocabulary``) to ``x_BTD``.

    Raises ValueError for a sequence longer than ``context`` tokens.
    """

    def __init__(self, vocabulary: int, width: int, context: int, dropout: float) -> None:
        super().__init__()
        self.context = context
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        if tokens_BT.shape[-1] > self.context:
            raise ValueError(
                f"a sample has {tokens_BT.shape[-1]} tokens but the model's context is {self.context}: "
                "raise the model's context or lower the data's"
            )
        x_BTD: Tensor = self.dropout(F.embedding(tokens_BT, self.weight))
        return x_BTD

    def phases(self) -> Phases:
        """See ``strategies.sequence``."""
        return by_token(self.forward)


class Block(nn.Module):
    """One pre-norm decoder block, ``x_BTD`` to ``x_BTD``."""

    def __init__(self, width: int, heads: int, context: int, dropout: float, expansion: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, context, dropout)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp_in = nn.Linear(width, expansion * width, bias=False)
        self.mlp_out = nn.Linear(expansion * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self._after_attention(x_BTD, self.attention(self.attention_norm(x_BTD)))

    def _after_attention(self, x_BTD: Tensor, attended_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.dropout(attended_BTD)
        hidden_BTE = F.gelu(self.mlp_in(self.mlp_norm(x_BTD)))
        x_BTD = x_BTD + self.dropout(self.mlp_out(hidden_BTE))
        return x_BTD

    def phases(self) -> Phases:
        """See ``strategies.sequence``: everything but the attention itself is done token by token."""
        steps = (
            Phase(Space.SLICES, self._project, ("x",), ("qkv",)),
            Phase(Space.HEADS, self.attention.of_head, ("qkv",), ("attended",), self.attention.heads),
            Phase(Space.SLICES, self._finish, ("x", "attended"), ("y",)),
        )
        return Phases(("x",), ("y",), steps)

    def _project(self, x_BTD: Tensor) -> tuple[Tensor]:
        """Queries, keys and values of every head side by side: ``B T H 3K``."""
        qkv_BTE: Tensor = self.attention.qkv(self.attention_norm(x_BTD))
        shape = (*qkv_BTE.shape[:2], 3, self.attention.heads, -1)
        return (qkv_BTE.view(shape).transpose(2, 3).flatten(3),)

    def _finish(self, x_BTD: Tensor, attended_BTHK: Tensor) -> tuple[Tensor]:
        return (self._after_attention(x_BTD, self.attention.out(attended_BTHK.flatten(2))),)


class Head(nn.Module):
    """Final norm and output projection, ``x_BTD`` to ``logits_BTV``."""

    def __init__(self, vocabulary: int, width: int, tied_to: nn.Parameter | None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.weight = nn.Parameter(torch.empty(vocabulary, width)) if tied_to is None else tied_to

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.linear(self.norm(x_BTD), self.weight)

    def phases(self) -> Phases:
        """See ``strategies.sequence``."""
        return by_token(self.forward)


def loss(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The sum (not the mean) of the tokens' cross entropies in nats, and the number of tokens.

    Both are 0-dimensional: float32 and int64. Targets equal to ``IGNORED`` count in neither.
    """
    total = F.cross_entropy(
        logits_BTV.float().flatten(0, -2), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total, (targets_BT != IGNORED).sum()


def build(
    *,
    width: int,
    depth: int,
    heads: int,
    context: int,
    vocabulary: int = 256,
    dropout: float = 0.1,
    tied: bool = True,
    expansion: int = 4,
    ladder: bool = False,
) -> tuple[list[nn.Module], Loss]:
    """Builds ``depth + 2`` layers and the loss, all parameters float32 on the CPU.

    Initial values come from torch's default generator: whoever wants the same model seeds it
    first. With ``tied`` the head's weight is the embedding's ``nn.Parameter`` itself. ``width`` is
    D, ``expansion`` the MLP's hidden width over D, ``context`` the longest sequence in tokens.

    With ``ladder`` the residuals are those of ``jobs.models.ladder``: another model, of the same parameters.

    Raises ValueError for sizes that do not fit together.
    """
    sizes = {
        "width": width,
        "depth": depth,
        "heads": heads,
        "context": context,
        "vocabulary": vocabulary,
        "expansion": expansion,
    }
    check_sizes(sizes, dropout)
    embedding = Embedding(vocabulary, width, context, dropout)
    blocks: list[Block]
    head: Head | LadderHead
    tied_to = embedding.weight if tied else None
    if ladder:
        from jobs.models.ladder import LadderBlock, LadderHead  # whose blocks are made of these

        sizes_of_block = (width, heads, context, dropout, expansion)
        blocks = [LadderBlock(*sizes_of_block, first=place == 0) for place in range(depth)]
        head = LadderHead(vocabulary, width, tied_to)
    else:
        blocks = [Block(width, heads, context, dropout, expansion) for _ in range(depth)]
        head = Head(vocabulary, width, tied_to)
    _initialise(embedding, blocks, head, tied)
    return [embedding, *blocks, head], loss


def check_sizes(sizes: Mapping[str, int], dropout: float) -> None:
    """What any decoder's ``sizes`` have to fulfil, ``width`` and ``heads`` among them. Raises ValueError."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"the model's {name} is {size}: it must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"the model's dropout is {dropout}: it must be at least 0 and below 1")
    width, heads = sizes["width"], sizes["heads"]
    if width % (2 * heads) != 0:
        raise ValueError(
            f"the model's width ({width}) is not a multiple of 2 x heads ({2 * heads}): rotary positions "
            "turn pairs of coordinates of each head, so choose such a width"
        )


def _initialise(embedding: Embedding, blocks: list[Block], head: Head | LadderHead, tied: bool) -> None:
    """Normal weights of deviation 0.02; projections into the residual stream are smaller by the
    root of their number, so that its variance does not grow with depth (Radford et al., 2019)."""
    deviation = 0.02
    residual = deviation / (2 * len(blocks)) ** 0.5
    nn.init.normal_(embedding.weight, std=deviation)
    for block in blocks:
        nn.init.normal_(block.attention.qkv.weight, std=deviation)
        nn.init.normal_(block.attention.out.weight, std=residual)
        nn.init.normal_(block.mlp_in.weight, std=deviation)
        nn.init.normal_(block.mlp_out.weight, std=residual)
    if not tied:
        nn.init.normal_(head.weight, std=deviation)
