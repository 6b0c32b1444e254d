"""One forward pass over many sequences at once without padding, with a key/value cache.

All rows of all sequences, whole prompts and single next tokens alike, lie in one matrix
[sum of lengths, width] everywhere but in attention, where each sequence meets its own keys only (Zhai et al.,
"ByteTransformer", IPDPS 2023, section III-D: prefix sums of the lengths say which rows are whose). Which
sequences share an iteration is decided anew every time (Yu et al., "Orca", OSDI 2022).

A sequence's numbers do not depend on its neighbours. Matrices are filled up with zero rows to a multiple
of ``ROWS``: from four rows on, matrix kernels add each row up in the same order whatever the number of
rows (with fewer they do not). Attention's shapes depend on the sequence alone. ``tests`` compare the bits.

Shape suffixes: N rows, D width, H heads, K width of a head, T positions of a prompt, n sequences of a pool,
E extent of a pool, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.models.gpt import Attention, Block
from jobs.serving.cache import Entry, KeyValueCache
from jobs.serving.decoder import Decoder, Told

ROWS = 8
"""Matrices have a multiple of so many rows."""


@dataclass(frozen=True, slots=True)
class _PoolRows:
    """The rows ``first`` to ``stop - 1`` are the next tokens of a pool's sequences in order of slots."""

    extent: int
    first: int
    stop: int
    lengths_n: Tensor
    mask_n1E: Tensor


@dataclass(frozen=True, slots=True)
class _PromptRows:
    entry: Entry
    first: int
    stop: int
    mask_TT: Tensor | None


def forward(
    decoder: Decoder,
    cache: KeyValueCache,
    prompts: Sequence[tuple[Entry, Tensor]],
    tokens: dict[int, int],
    texts: Sequence[Told] = (),
) -> Tensor:
    """Logits of the next tokens, [sequences in the pools before + prompts, V] on the CPU.

    ``prompts`` are (entry that was just inserted, x_TD): its keys and values are filled in.
    ``tokens`` gives the newest token of every other sequence in the cache, by ``id(entry)``; each must have
    room for it (``extend``) and is one longer afterwards. The logits come pool by pool in order of slots,
    then prompt by prompt (``order`` tells the same); in that order come ``texts``, what each sequence is so
    far, for a model that looks it up.
    """
    new = {id(entry) for entry, _ in prompts}
    pools: list[_PoolRows] = []
    next_tokens: list[int] = []
    positions: list[int] = []
    for extent, pool in cache.pools:
        going = [entry for entry in pool.entries if id(entry) not in new]
        assert going == pool.entries[: len(going)], "new sequences come after the others in their pool"
        if not going:
            continue
        lengths = [entry.length for entry in going]
        lengths_n = torch.tensor(lengths, device=decoder.device)
        beyond_nE = torch.arange(extent, device=decoder.device) > lengths_n[:, None]
        mask_n1E = torch.zeros(beyond_nE.shape, device=decoder.device).masked_fill(beyond_nE, -torch.inf)
        first = len(next_tokens)
        next_tokens += [tokens[id(entry)] for entry in going]
        positions += lengths
        pools.append(_PoolRows(extent, first, len(next_tokens), lengths_n, mask_n1E[:, None]))
    starts = list(accumulate((len(x_TD) for _, x_TD in prompts), initial=len(next_tokens)))
    prompt_rows = [
        _PromptRows(entry, first, stop, _prefix_mask(stop - first, decoder.prefix, decoder.device))
        for (entry, _), first, stop in zip(prompts, starts, starts[1:], strict=False)
    ]
    for _, x_TD in prompts:
        positions += range(len(x_TD))
    parts = [decoder.embed(torch.tensor(next_tokens, device=decoder.device))] if next_tokens else []
    x_ND = _filled_up(torch.cat([*parts, *(x_TD for _, x_TD in prompts)]))
    positions += [0] * (len(x_ND) - len(positions))
    angles = decoder.angles(torch.tensor(positions, device=decoder.device))
    for layer, block in enumerate(decoder.blocks):
        x_ND = _block(block, x_ND, layer, angles, cache, pools, prompt_rows)
    for rows in pools:
        for entry in cache.pool(rows.extent).entries[: rows.stop - rows.first]:
            entry.length += 1
    last_N = [*range(len(next_tokens)), *(rows.stop - 1 for rows in prompt_rows)]
    logits_NV = decoder.logits(_filled_up(x_ND[last_N]), texts)
    return logits_NV[: len(last_N)].float().cpu()


def order(cache: KeyValueCache, prompts: Sequence[Entry]) -> list[Entry]:
    """The sequences in the order of the logits that ``forward`` returns."""
    new = {id(entry) for entry in prompts}
    return [e for _, pool in cache.pools for e in pool.entries if id(e) not in new] + list(prompts)


def _prefix_mask(length: int, prefix: int, device: torch.device) -> Tensor | None:
    """Which (query, key) may meet where everybody sees the first ``prefix``; None: all look back only."""
    if not prefix:
        return None
    mask_TT = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask_TT[:, :prefix] = True
    return mask_TT


def _filled_up(x_ND: Tensor) -> Tensor:
    missing = -len(x_ND) % ROWS
    return F.pad(x_ND, (0, 0, 0, missing)) if missing else x_ND


def _block(
    block: Block,
    x_ND: Tensor,
    layer: int,
    angles: tuple[Tensor, Tensor],
    cache: KeyValueCache,
    pools: Sequence[_PoolRows],
    prompts: Sequence[_PromptRows],
) -> Tensor:
    y_ND = _attend(block.attention, block.attention_norm(x_ND), layer, angles, cache, pools, prompts)
    x_ND = x_ND + y_ND
    hidden_NE = F.gelu(block.mlp_in(block.mlp_norm(x_ND)))
    out_ND: Tensor = x_ND + block.mlp_out(hidden_NE)
    return out_ND


def _attend(
    attention: Attention,
    x_ND: Tensor,
    layer: int,
    angles: tuple[Tensor, Tensor],
    cache: KeyValueCache,
    pools: Sequence[_PoolRows],
    prompts: Sequence[_PromptRows],
) -> Tensor:
    q_NHK, k_NHK, v_NHK = attention.qkv(x_ND).unflatten(-1, (3, attention.heads, -1)).unbind(1)
    q_NHK, k_NHK = _rotated(q_NHK, angles), _rotated(k_NHK, angles)
    y_NHK = torch.zeros_like(q_NHK)
    for rows in pools:
        pool = cache.pool(rows.extent)
        n = rows.stop - rows.first
        slots_n = torch.arange(n, device=x_ND.device)
        keys_SHEK, values_SHEK = pool.keys_SHEK[layer], pool.values_SHEK[layer]
        keys_SHEK[slots_n, :, rows.lengths_n] = k_NHK[rows.first : rows.stop]
        values_SHEK[slots_n, :, rows.lengths_n] = v_NHK[rows.first : rows.stop]
        q_nH1K = q_NHK[rows.first : rows.stop, :, None] * q_NHK.shape[-1] ** -0.5
        scores_nH1E = q_nH1K @ keys_SHEK[:n].transpose(-1, -2) + rows.mask_n1E[:, None]
        y_NHK[rows.first : rows.stop] = (scores_nH1E.softmax(-1) @ values_SHEK[:n]).squeeze(2)
    for prompt in prompts:
        q_HTK, k_HTK, v_HTK = (
            part_NHK[prompt.first : prompt.stop].transpose(0, 1) for part_NHK in (q_NHK, k_NHK, v_NHK)
        )
        cache.fill(prompt.entry, layer, k_HTK, v_HTK)
        y_1HTK = F.scaled_dot_product_attention(
            q_HTK[None], k_HTK[None], v_HTK[None], attn_mask=prompt.mask_TT, is_causal=prompt.mask_TT is None
        )
        y_NHK[prompt.first : prompt.stop] = y_1HTK[0].transpose(0, 1)
    y_ND: Tensor = attention.out(y_NHK.flatten(1))
    return y_ND


def _rotated(x_NHK: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cos_N1K, sin_N1K = angles
    first, second = x_NHK.chunk(2, dim=-1)
    return torch.cat((first * cos_N1K - second * sin_N1K, first * sin_N1K + second * cos_N1K), dim=-1)
