"""The HTTP interface over an engine in this process, and who asks it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from actors.serving import Overloaded, Piece
from jobs.data.tokenizer import CaptionTokenizer
from jobs.serving.generation import Generation
from jobs.serving.host import EngineHost
from jobs.serving.scheduler import Limits
from jobs.serving.source import RunSource
from tests.support.served import make_run, write_checkpoint

TOKENIZER = CaptionTokenizer(["en", "fr", "de"])
CAPTIONER: dict[str, Any] = {
    "image_size": 16,
    "patch": 4,
    "width": 32,
    "depth_image": 1,
    "depth_text": 2,
    "heads": 2,
    "vocabulary": TOKENIZER.vocabulary,
    "context": 60,
    "audio": True,
    "audio_rate": 1600,
    "audio_seconds": 0.32,
    "mels": 8,
}


class Local:
    """One engine as the whole backend; ``fails`` is raised by the next generation, after ``after`` pieces.
    While it is ``full`` nobody is admitted."""

    continued = 3

    def __init__(self, host: EngineHost) -> None:
        self.host = host
        self.asked: list[Generation] = []
        self.fails: Exception | None = None
        self.after = 0
        self.full: Overloaded | None = None
        self.admitted_now = 0

    @contextmanager
    def admitted(self) -> Iterator[None]:
        if self.full is not None:
            raise self.full
        self.admitted_now += 1
        try:
            yield
        finally:
            self.admitted_now -= 1

    async def generate(self, asked: Generation, every: int) -> AsyncIterator[Piece]:
        assert self.admitted_now > 0
        self.asked.append(asked)
        fails, self.fails = self.fails, None
        pieces = self.host.generate(asked, every)
        count = 0
        async for piece in pieces:
            if fails is not None and count == self.after:
                raise fails
            count += 1
            yield piece

    async def stats(self) -> list[dict[str, Any]]:
        return [{**self.host.stats(), "process": 7}]


@contextmanager
def answering(folder: Path, **made: Any) -> Iterator[Local]:
    """An engine with the only checkpoint, of step 10, of a run that is made in ``folder``; ``made`` goes to
    ``make_run``."""
    write_checkpoint(folder, make_run(folder, **made), 10, 1)
    host = EngineHost(RunSource(folder), Limits(), 1, 1000.0)
    try:
        yield Local(host)
    finally:
        host.close()


class Client:
    """Synchronous requests to an ASGI application, each in an event loop of its own."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def __call__(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(ask())


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
