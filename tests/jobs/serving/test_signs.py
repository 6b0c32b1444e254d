"""Signs of life of a replica: from a working engine in which a request waits, and not from a stuck one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors.serving import Piece
from jobs.serving import host as host_module
from jobs.serving.engine import Token
from jobs.serving.generation import Generation, Prompt
from jobs.serving.host import EngineHost
from jobs.serving.scheduler import Limits
from jobs.serving.source import RunSource
from tests.support.served import make_run, write_checkpoint

SIGN_SECONDS = 0.01


async def following(pieces: AsyncIterator[Piece]) -> Piece:
    return await anext(pieces)


def test_an_engine_that_works_is_heard_of_and_one_that_is_stuck_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "SIGN_SECONDS", SIGN_SECONDS)
    write_checkpoint(tmp_path, make_run(tmp_path), 10, 10)
    host = EngineHost(RunSource(tmp_path), Limits(), 1, 1000.0)
    step = host._engine.step
    is_busy, is_stuck, go_on = threading.Event(), threading.Event(), threading.Event()
    is_busy.set()

    def delayed() -> list[Token]:
        if is_busy.is_set():
            time.sleep(SIGN_SECONDS / 4)  # for others, whose answers are under way
            return []
        is_stuck.set()
        go_on.wait()
        return step()

    monkeypatch.setattr(host._engine, "step", delayed)

    async def answer() -> tuple[list[Piece], list[Piece]]:
        heard: list[Piece] = []
        pieces = host.generate(Generation(Prompt((65, 66)), 5), 100)
        for _ in range(3):
            heard.append(await anext(pieces))
        is_busy.clear()
        await asyncio.to_thread(is_stuck.wait)
        while_stuck: list[Piece] = []
        coming = asyncio.ensure_future(following(pieces))
        while (await asyncio.wait({coming}, timeout=20 * SIGN_SECONDS))[0]:
            while_stuck.append(coming.result())
            coming = asyncio.ensure_future(following(pieces))
            assert len(while_stuck) < 100
        go_on.set()
        rest = [await coming, *[piece async for piece in pieces]]
        assert sum((piece.tokens for piece in rest), ()) and rest[-1].finish == "length"
        return heard, while_stuck

    try:
        heard, while_stuck = asyncio.run(answer())
    finally:
        go_on.set()
        host.close()
    assert heard == [Piece((), 10, None)] * 3
    assert len(while_stuck) <= 1, "what had moved before it got stuck is told once"
