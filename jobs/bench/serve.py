"""Requests a second and latency of ``reknit serve`` beside plain Ray Serve, and a killed replica.

Both serve the same checkpoint from one Ray Serve, with one replica of one thread each, to the same clients,
who ask one question after the other; whoever is not at turn has nothing to do. Prompts and answers are of
mixed lengths (log-uniform). The peer (``plain_serve``) batches by ``@serve.batch``, pads, and has a key/value
cache too. Then two replicas are loaded, and one is killed in mid-answer.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import httpx
import torch
from ray import serve
from rich.console import Console

from actors.cluster import connect
from actors.serving import Scale, ServedApplication
from jobs.bench import plain_serve
from jobs.bench.report import BenchReport
from jobs.bench.untrained import write_checkpoint
from jobs.builders import build_layers
from jobs.recipe.recipe import Recipe
from jobs.serve import serving
from jobs.serving.scheduler import Limits
from runtime.run_folder import RunFolder

GOAL_RATIO = 1.5
CLIENTS = 24
REQUESTS = 120
"""Of one turn."""

ROUNDS = 3
SEQUENCES = 16
"""At once in an engine: as many as a batch of the peer."""

PROMPT, ANSWER = (8, 192), (8, 160)
"""Shortest and longest, in tokens."""

MODEL = {"width": 256, "depth": 6, "heads": 8, "context": 384, "vocabulary": 256, "tied": False}
SPREAD = 4.0
"""Matrices are so much larger than at the start of training: logits are then far apart, as a trained model's
are, and a low bit does not decide between two tokens."""

OURS, PLAIN = "/v1/completions", "/plain"


@dataclass(frozen=True, slots=True)
class Request:
    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """``text`` None: the request failed. ``seconds`` from asking to the whole answer."""

    text: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Turn:
    """All replies, in the order of the requests, and how long they took together."""

    replies: tuple[Reply, ...]
    seconds: float

    @property
    def rate(self) -> float:
        return len(self.replies) / self.seconds

    @property
    def failed(self) -> int:
        return sum(reply.text is None for reply in self.replies)

    def latency(self, percent: int) -> float:
        return quantiles([reply.seconds for reply in self.replies], n=100, method="inclusive")[percent - 1]


def workload(count: int, seed: int) -> list[Request]:
    """Requests of mixed lengths; a pure function of its arguments."""
    draw = random.Random(seed)

    def length(bounds: tuple[int, int]) -> int:
        low, high = map(math.log, bounds)
        return round(math.exp(draw.uniform(low, high)))

    letters = "abcdefghijklmnopqrstuvwxyz      "
    return [Request("".join(draw.choices(letters, k=length(PROMPT))), length(ANSWER)) for _ in range(count)]


async def ask_all(
    url: str, path: str, requests: Sequence[Request], clients: int, reached: asyncio.Event | None = None
) -> Turn:
    """``clients`` ask the requests in their order, each the next one when it has its answer. ``reached`` is
    set when a third is answered."""
    replies: dict[int, Reply] = {}
    numbers = iter(range(len(requests)))
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:

        async def client() -> None:
            for number in numbers:
                asked = requests[number]
                began = time.perf_counter()
                body = {"prompt": asked.prompt, "max_tokens": asked.max_tokens}
                text = None
                try:
                    response = await http.post(path, json=body)
                    if response.status_code == 200:
                        value = response.json()
                        text = value["text"] if "text" in value else value["choices"][0]["text"]
                except (httpx.HTTPError, ValueError, KeyError):
                    text = None
                replies[number] = Reply(text, time.perf_counter() - began)
                if reached is not None and 3 * len(replies) >= len(requests):
                    reached.set()

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - began
    return Turn(tuple(replies[number] for number in range(len(requests))), seconds)


def equal_share(one: Turn, other: Turn) -> float:
    """The share of requests that both answered alike."""
    pairs = zip(one.replies, other.replies, strict=True)
    return sum(a.text == b.text is not None for a, b in pairs) / len(one.replies)


def prepare(folder: Path) -> Path:
    """A run folder with an untrained model's checkpoint, which says printable characters only."""
    recipe = Recipe.model_validate(
        {
            "run": {"name": "bench", "steps": 1, "seed": 1},
            "model": {"arguments": MODEL},
            "data": {"arguments": {"context": MODEL["context"]}},
            "optimizer": {"learning_rate": 1e-3},
            "parallel": {"workers": 1, "micro_batches": 1, "micro_batch_size": 1},
        }
    )
    RunFolder.create(folder, recipe.to_toml(), {"seed": 1})
    torch.manual_seed(recipe.run.seed)
    layers, _ = build_layers(recipe.model.build, recipe.model.arguments)
    with torch.no_grad():
        for parameter in (p for layer in layers for p in layer.parameters() if p.ndim == 2):
            parameter.mul_(SPREAD)
        for weight in (layers[-1].get_parameter("weight"),):
            weight[:32], weight[127:] = 0.0, 0.0
    write_checkpoint(folder, recipe, 1, layers)
    return folder


def run(console: Console) -> BenchReport:
    """Measures; takes some minutes."""
    with tempfile.TemporaryDirectory() as temporary, connect(None, 4, 1.0, 0.0):
        folder = prepare(Path(temporary) / "run")
        turns = _turns(folder, console)
        killed, expected = _killed(folder, console)
    return report(turns[OURS], turns[PLAIN], killed, expected)


def _turns(folder: Path, console: Console) -> dict[str, list[Turn]]:
    turns: dict[str, list[Turn]] = {OURS: [], PLAIN: []}
    limits = Limits(sequences=SEQUENCES)
    with serving(folder, port=0, scale=Scale(1, 1, queued=1000), limits=limits) as (_, url):
        serve.run(plain_serve.application(folder, 1, 1.0), name="plain", route_prefix=PLAIN)
        for path in (OURS, PLAIN):
            asyncio.run(ask_all(url, path, workload(CLIENTS, 0), CLIENTS))  # caches and connections
        for number in range(1, ROUNDS + 1):
            requests = workload(REQUESTS, number)
            for path in (OURS, PLAIN) if number % 2 else (PLAIN, OURS):
                turns[path].append(asyncio.run(ask_all(url, path, requests, CLIENTS)))
            rates = f"{turns[OURS][-1].rate:.2f} and {turns[PLAIN][-1].rate:.2f} requests a second"
            console.print(f"round {number} of {ROUNDS}: {rates}", highlight=False)
        serve.delete("plain")
    return turns


def _killed(folder: Path, console: Console) -> tuple[Turn, Turn]:
    """The turn in which one of two replicas is killed, and the same one undisturbed."""
    requests = workload(REQUESTS, ROUNDS + 1)
    limits = Limits(sequences=SEQUENCES)
    with serving(folder, port=0, scale=Scale(2, 2, queued=1000), limits=limits) as (served, url):
        undisturbed = asyncio.run(ask_all(url, OURS, requests, CLIENTS))
        console.print("killing one of two replicas", highlight=False)
        disturbed = asyncio.run(_disturbed(served, url, requests))
    return disturbed, undisturbed


async def _disturbed(served: ServedApplication, url: str, requests: Sequence[Request]) -> Turn:
    reached = asyncio.Event()
    load = asyncio.create_task(ask_all(url, OURS, requests, CLIENTS, reached))
    await reached.wait()
    stats = await asyncio.to_thread(served.stats)
    os.kill(max(stats, key=lambda each: int(each["running"]))["process"], signal.SIGKILL)
    return await load


def report(ours: Sequence[Turn], plain: Sequence[Turn], killed: Turn, undisturbed: Turn) -> BenchReport:
    """From the turns to the figures. An answer that is not the undisturbed one's counts as failed."""
    ratio = median(own.rate / peer.rate for own, peer in zip(ours, plain, strict=True))
    equal = min(equal_share(own, peer) for own, peer in zip(ours, plain, strict=True))
    failed = sum(turn.failed for turn in (*ours, undisturbed)) + round(
        (1 - equal_share(killed, undisturbed)) * len(killed.replies)
    )
    rows: list[Mapping[str, str | float | int | None]] = [
        {
            "what": name,
            "requests_per_second": median(turn.rate for turn in turns),
            "p50_seconds": median(turn.latency(50) for turn in turns),
            "p99_seconds": median(turn.latency(99) for turn in turns),
            "failed": sum(turn.failed for turn in turns),
        }
        for name, turns in (
            ("reknit serve", ours),
            ("@serve.batch with padding", plain),
            ("reknit serve, 2 replicas", [undisturbed]),
            ("one of them killed", [killed]),
        )
    ]
    return BenchReport(
        bench="serve",
        headline={
            "ratio_to_plain_serve": ratio,
            "equal_answers": equal,
            "failed_requests": failed,
        },
        goal=f"ratio_to_plain_serve >= {GOAL_RATIO}, failed_requests = 0, equal_answers = 1",
        met=ratio >= GOAL_RATIO and failed == 0 and equal == 1.0,
        rows=tuple(rows),
        notes=(
            f"GPT of width {MODEL['width']}, depth {MODEL['depth']}; {CLIENTS} clients, {len(ours)} rounds "
            f"of {len(ours[0].replies)} requests; prompts of {PROMPT[0]} to {PROMPT[1]} tokens, answers of "
            f"{ANSWER[0]} to {ANSWER[1]} (log-uniform); greedy; clients run on the same cores",
            "one replica of one thread each; the ratio is the median over the rounds. The peer answers "
            f"batches of up to {plain_serve.BATCH}, padded, with a cache, until the longest is done",
            "failed_requests: of all of ours, answers that did not come or, after the kill, were others",
        ),
    )
