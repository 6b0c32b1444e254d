"""Replicas on a real Ray Serve that come with the load, hang, and leave. Answers there take time, no work."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import httpx
import pytest
from ray import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from actors.serving import APPLICATION, REPLICAS, Piece, Replicas, Scale, ServedApplication, application
from tests.support.counts import Count
from tests.support.dashboard import free_port
from tests.support.ray_cluster import local_ray
from tests.support.ray_jobs import wait_until

pytestmark = pytest.mark.ray

LENGTH = 60
CLIENTS = 5


class Counter:
    """Ten numbers a second for everybody."""

    def __init__(self) -> None:
        self._running = 0

    async def generate(self, asked: Count, every: int) -> AsyncIterator[Piece]:
        self._running += 1
        try:
            for number in range(len(asked.given), LENGTH):
                await asyncio.sleep(0.1)
                yield Piece((number,), 1, "length" if number == LENGTH - 1 else None)
        finally:
            self._running -= 1

    def stats(self) -> Mapping[str, Any]:
        return {"running": self._running}

    def check(self) -> None:
        """It does not fail."""


def build_app(replicas: Replicas) -> Starlette:
    async def count(_: Request) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            async for piece in replicas.generate(Count(), 1):
                for token in piece.tokens:
                    yield f"{token}\n"
            yield f"{replicas.continued}\n"

        return StreamingResponse(lines())

    return Starlette(routes=[Route("/", count)])


def running() -> dict[str, int]:
    """Replicas by state, as Ray Serve says."""
    states = serve.status().applications[APPLICATION].deployments[REPLICAS].replica_states
    return {str(getattr(state, "value", state)): count for state, count in states.items() if count}


def test_replicas_come_with_the_load_and_one_that_hangs_costs_no_answer() -> None:
    port = free_port()
    scale = Scale(1, 2, cpus=1.0, target=2.0, silence_seconds=3.0, idle_seconds=2.0)
    app = application(Counter, build_app, scale)
    stopped: list[int] = []

    async def load(served: ServedApplication) -> list[list[int]]:
        enough = asyncio.Event()
        answers: list[list[int]] = []
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=240) as client:

            async def one() -> None:
                while not enough.is_set():
                    answers.append([int(line) for line in (await client.get("/")).text.split()])

            clients = [asyncio.create_task(one()) for _ in range(CLIENTS)]
            both = await asyncio.to_thread(
                wait_until,
                lambda: (
                    len(found := served.stats()) == 2 and all(each["running"] for each in found) and found
                ),
                "a second replica that answers",
                interval=0.5,
            )
            stopped.append(max(both, key=lambda each: each["running"])["process"])
            os.kill(stopped[0], signal.SIGSTOP)
            enough.set()
            await asyncio.gather(*clients)
        return answers

    try:
        with local_ray(2), ServedApplication(app, "127.0.0.1", port) as served:
            assert running() == {"RUNNING": 1}
            answers = asyncio.run(load(served))
            assert [each[:-1] for each in answers] == [list(range(LENGTH))] * len(answers)
            assert max(each[-1] for each in answers) >= 1, "an answer was continued"
            with suppress(ProcessLookupError):  # Ray Serve may have ended it by now
                os.kill(stopped.pop(), signal.SIGKILL)
            wait_until(lambda: running() == {"RUNNING": 1}, "no more replicas than are needed", interval=0.5)
    finally:
        for process in stopped:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
