"""An engine in a thread of its own, asked from an event loop, that takes over new checkpoints by itself."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch

from actors.serving import Piece
from actors.silence import SIGN_SECONDS
from jobs.serving.decoder import Decoder
from jobs.serving.engine import Engine, Token
from jobs.serving.generation import Generation
from jobs.serving.scheduler import Limits
from jobs.serving.source import RunSource
from runtime.checkpoint import CheckpointDamaged

STOP_SECONDS = 10.0

WATCH_SECONDS = 1.0
"""How often a replica looks for a newer checkpoint."""

_LOG = logging.getLogger(__name__)

_Listener = Callable[[Token | ValueError], None]


class EngineHost:
    """Serves ``source`` until ``close``. ``watch_seconds`` is how often a newer checkpoint is looked for.

    A new version is loaded beside the old one while that goes on answering. Raises ValueError if there is no
    checkpoint to begin with.
    """

    def __init__(self, source: RunSource, limits: Limits, threads: int, watch_seconds: float) -> None:
        self._source, self._watch_seconds = source, watch_seconds
        torch.set_num_threads(threads)
        version, decoder = source.first()
        self._engine = Engine(version, decoder, limits)
        self._listeners: dict[int, _Listener] = {}
        self._recalls: dict[int, asyncio.Future[Decoder | None]] = {}
        """The versions that are being loaded at the moment."""
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        self._busy_seconds = 0.0
        self._moves = 0
        """Iterations of the engine so far: while a request waits, each is a sign of life."""
        self._threads = [threading.Thread(target=self._run, args=(threads,), name="engine", daemon=True)]
        if source.pinned is None:
            self._threads.append(threading.Thread(target=self._watch, name="watch", daemon=True))
        for thread in self._threads:
            thread.start()

    async def generate(self, generation: Generation, every: int) -> AsyncIterator[Piece]:
        """The answer in pieces of at least ``every`` tokens; the last piece has a ``finish``. What there is
        after ``SIGN_SECONDS`` is told, be it nothing, unless the engine has not moved since.

        Raises ValueError for a request that the model cannot take.
        """
        recalled = None
        if generation.version is not None and generation.version not in self._engine.versions:
            loading = self._recalled(generation.version)
            while not (await asyncio.wait({loading}, timeout=SIGN_SECONDS))[0]:
                yield Piece((), generation.version, None)
            recalled = loading.result()
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Token | ValueError] = asyncio.Queue()
        number = next(self._numbers)

        def listener(token: Token | ValueError) -> None:
            with suppress(RuntimeError):  # the loop has been closed: nobody listens any more
                loop.call_soon_threadsafe(arrived.put_nowait, token)

        self._post(lambda: self._submit(number, generation, listener, recalled))
        tokens: list[int] = []
        version, moves, told = self._engine.version, self._moves, loop.time()
        try:
            while True:
                try:
                    async with asyncio.timeout_at(told + SIGN_SECONDS):
                        token = await arrived.get()
                except TimeoutError:
                    if tokens or self._moves != moves:
                        yield Piece(tuple(tokens), version, None)
                    tokens, moves, told = [], self._moves, loop.time()
                    continue
                if isinstance(token, ValueError):
                    raise token
                version = token.version
                if token.token is not None:
                    tokens.append(token.token)
                if token.finish is not None or (len(tokens) >= every and arrived.empty()):
                    yield Piece(tuple(tokens), version, token.finish)
                    tokens, moves, told = [], self._moves, loop.time()
                if token.finish is not None:
                    return
        finally:
            self._post(lambda: self._forget(number))

    def _recalled(self, version: int) -> asyncio.Future[Decoder | None]:
        """What ``_recall`` finds: all who want the same version meanwhile wait for the same load."""
        if version not in self._recalls:
            loading = asyncio.ensure_future(asyncio.to_thread(self._recall, version))
            self._recalls[version] = loading
            loading.add_done_callback(lambda _: self._recalls.pop(version, None))
        return self._recalls[version]

    def stats(self) -> dict[str, Any]:
        """Numbers of this replica; ``busy_seconds`` is the time spent in iterations."""
        return {**asdict(self._engine.stats), "busy_seconds": self._busy_seconds}

    def check(self) -> None:
        """Raises RuntimeError if the engine has failed."""
        if self._failure is not None:
            raise RuntimeError(f"the engine failed: {self._failure!r}")

    def close(self) -> None:
        """Ends the threads; answers under way get no more tokens. Idempotent."""
        self._closing.set()
        with self._changed:
            self._changed.notify()
        for thread in self._threads:
            thread.join(STOP_SECONDS)

    # In the engine's thread.

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            while not self._closing.is_set():
                with self._changed:
                    while not self._inbox and self._engine.is_idle and not self._closing.is_set():
                        self._changed.wait()
                    inbox, self._inbox = self._inbox, []
                for act in inbox:
                    act()
                began = time.perf_counter()
                told = self._engine.step()
                self._moves += 1
                self._busy_seconds += time.perf_counter() - began if told else 0.0
                for token in told:
                    listener = self._listeners.get(token.request)
                    if listener is not None:
                        listener(token)
        except BaseException as error:
            self._failure = error
            raise

    def _submit(
        self, number: int, generation: Generation, listener: _Listener, recalled: Decoder | None
    ) -> None:
        if recalled is not None and generation.version is not None:
            self._engine.take_over(generation.version, recalled)
        try:
            self._engine.submit(number, generation)
        except ValueError as error:
            listener(error)
            return
        self._listeners[number] = listener

    def _forget(self, number: int) -> None:
        self._listeners.pop(number, None)
        self._engine.cancel(number)

    # In others.

    def _post(self, act: Callable[[], None]) -> None:
        with self._changed:
            self._inbox.append(act)
            self._changed.notify()

    def _recall(self, version: int) -> Decoder | None:
        """An answer that was begun elsewhere with another version than ours goes on with that one, if its
        checkpoint is still there."""
        with suppress(CheckpointDamaged, OSError, ValueError):
            return self._source.load(version)
        return None

    def _watch(self) -> None:
        trouble = ""  # what went wrong at the last look
        while not self._closing.wait(self._watch_seconds):
            try:
                found = self._source.newer_than(self._engine.version)
            # a checkpoint may be pruned while it is read, a folder may be away for a while, and torch has no
            # type of its own for memory that cannot be had: whatever it is, the next look may find it gone
            except Exception as error:
                if repr(error) != trouble:
                    _LOG.warning("no newer checkpoint could be looked for, trying again: %r", error)
                trouble = repr(error)
                continue
            trouble = ""
            if found is not None:
                version, decoder = found
                self._post(lambda v=version, d=decoder: self._engine.take_over(v, d))  # type: ignore[misc]
