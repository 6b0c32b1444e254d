"""What a competent user of Ray Serve writes without an engine: ``@serve.batch`` with padding and a cache.

One deployment is ingress and model, so a request takes one hop less than ours. Requests are gathered into
batches of up to ``BATCH`` (Ray Serve's own dynamic batching), padded to the longest prompt, and answered
with a key/value cache until the longest answer is done; the event loop stays free meanwhile. ``BATCH`` is
as many as our engine has sequences at once.

Shape suffixes: B sequences of a batch, T positions of the longest prompt, C positions of the cache, D width,
H heads, K width of a head, V vocabulary.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from torch import Tensor
from torch.nn import functional as F

from jobs.models.captioner import finish_block, rotated, split_heads
from jobs.serving.decoder import Decoder
from jobs.serving.source import RunSource

BATCH = 16
WAIT_SECONDS = 0.02
CONCURRENT = 64
"""Requests that a replica takes at once, so that the next batch is there when one is done."""

Asked = tuple[list[int], int]
"""The prompt's tokens and how many are wanted."""


class PaddedGenerator:
    """Greedy answers to whole batches with the model of ``decoder``."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    @torch.inference_mode()
    def __call__(self, batch: Sequence[Asked]) -> list[list[int]]:
        """Each prompt's continuation, of as many tokens as it asks for."""
        decoder = self._decoder
        lengths_B = torch.tensor([len(prompt) for prompt, _ in batch])
        wanted = [most for _, most in batch]
        longest, steps = int(lengths_B.max()), max(wanted)
        capacity = longest + steps
        tokens_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, (prompt, _) in enumerate(batch):
            tokens_BT[row, : len(prompt)] = torch.tensor(prompt)
        attention = decoder.blocks[0].attention
        head_width = attention.qkv.in_features // attention.heads
        shape = (len(batch), attention.heads, capacity, head_width)
        caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in decoder.blocks]
        position_BT = torch.arange(longest).expand(len(batch), -1)
        causal_TT = torch.ones(longest, longest, dtype=torch.bool).tril()
        x_BTD = decoder.embed(tokens_BT)
        for block, (keys_BHCK, values_BHCK) in zip(decoder.blocks, caches, strict=True):
            q, k, v = split_heads(block, block.attention_norm(x_BTD))
            q, k = (rotated(block.attention.rotary, part, position_BT) for part in (q, k))
            keys_BHCK[:, :, :longest], values_BHCK[:, :, :longest] = k, v
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_TT)
            x_BTD = finish_block(block, x_BTD, attended)
        rows_B = torch.arange(len(batch))
        newest_B = decoder.logits(x_BTD[rows_B, lengths_B - 1]).argmax(-1)
        told = [newest_B]
        for _ in range(steps - 1):
            newest_B = self._next(newest_B, lengths_B, caches, rows_B)
            lengths_B = lengths_B + 1
            told.append(newest_B)
        told_BS = torch.stack(told, dim=1).tolist()
        return [answer[:most] for answer, most in zip(told_BS, wanted, strict=True)]

    def _next(
        self, newest_B: Tensor, lengths_B: Tensor, caches: Sequence[tuple[Tensor, Tensor]], rows_B: Tensor
    ) -> Tensor:
        decoder = self._decoder
        used = int(lengths_B.max()) + 1
        mask_B11C = (torch.arange(used) <= lengths_B[:, None])[:, None, None]
        x_B1D = decoder.embed(newest_B[:, None])
        for block, (keys_BHCK, values_BHCK) in zip(decoder.blocks, caches, strict=True):
            q, k, v = split_heads(block, block.attention_norm(x_B1D))
            q, k = (rotated(block.attention.rotary, part, lengths_B[:, None]) for part in (q, k))
            keys_BHCK[rows_B, :, lengths_B], values_BHCK[rows_B, :, lengths_B] = k[:, :, 0], v[:, :, 0]
            attended = F.scaled_dot_product_attention(
                q, keys_BHCK[:, :, :used], values_BHCK[:, :, :used], attn_mask=mask_B11C
            )
            x_B1D = finish_block(block, x_B1D, attended)
        return decoder.logits(x_B1D[:, 0]).argmax(-1)


class PlainServe:
    """The deployment. Takes {"prompt", "max_tokens"}, gives {"text"}."""

    def __init__(self, run: str, threads: int) -> None:
        from actors.ray_worker import SWITCH_INTERVAL

        sys.setswitchinterval(SWITCH_INTERVAL)  # as for ours
        torch.set_num_threads(threads)
        self._threads = threads
        _, decoder = RunSource(Path(run)).first()
        self._generate = PaddedGenerator(decoder)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_SECONDS)
    async def answer(self, batch: list[Asked]) -> list[list[int]]:
        return await asyncio.to_thread(self._compute, batch)

    async def __call__(self, request: Request) -> dict[str, str]:
        body = await request.json()
        # the decorator turns a function of a list into one of an element
        asked: Any = (list(body["prompt"].encode()), body["max_tokens"])
        tokens: Any = await self.answer(asked)
        return {"text": bytes(tokens).decode(errors="ignore")}

    def _compute(self, batch: list[Asked]) -> list[list[int]]:
        torch.set_num_threads(self._threads)
        return self._generate(batch)


def application(run: Path, threads: int, cpus: float) -> serve.Application:
    """One replica of the plain deployment."""
    deployment: Any = serve.deployment(
        PlainServe,
        name="PlainServe",
        num_replicas=1,
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=CONCURRENT,
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
    )
    bound: serve.Application = deployment.bind(str(run), threads)
    return bound
