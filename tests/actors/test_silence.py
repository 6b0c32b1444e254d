"""Replicas that hang without dying: their answers go on elsewhere. In simulated time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors.serving import ATTEMPTS, Overloaded, Piece, Replicas, Scale, Unavailable
from actors.silence import SIGN_SECONDS, Silent, attended
from tests.support.counts import Count

SECONDS = Scale().silence_seconds
LENGTH = 6


class Clock(selectors.SelectSelector):
    """Time that passes when there is nothing else to do."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None:
            self.now += max(0.0, timeout)
        return super().select(None if timeout is None else 0)


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._simulated = Clock()
        super().__init__(self._simulated)

    def time(self) -> float:
        return self._simulated.now


def simulated(work: Coroutine[Any, Any, list[int]]) -> list[int]:
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(work)


class Stream:
    """One replica's part of an answer: it tells ``tokens`` of them and is then silent, or goes on."""

    def __init__(self, asked: Count, tokens: int | None, signs: int) -> None:
        self._asked, self._tokens, self._signs = asked, tokens, signs
        self._pieces = self._tell()
        self.cancelled = False

    async def _tell(self) -> AsyncIterator[Piece]:
        for _ in range(self._signs):
            await asyncio.sleep(0.9 * SECONDS)
            yield Piece((), 1, None)
        for place, number in enumerate(range(len(self._asked.given), LENGTH)):
            if place == self._tokens:
                await asyncio.Event().wait()
            yield Piece((number,), 1, "length" if number == LENGTH - 1 else None)

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        return await anext(self._pieces)

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Stands for Ray Serve's: the n-th request is answered as the n-th of ``tokens`` says (None: to the end)
    with ``signs`` of life before. ``stats`` are what its replicas tell of themselves."""

    def __init__(self, *tokens: int | None, signs: int = 0, stats: Any = ({},)) -> None:
        self._tokens, self._signs, self._stats = list(tokens), signs, list(stats)
        self.asked: list[Count] = []
        self.streams: list[Stream] = []
        self.looks = 0

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, asked: Count, _: int) -> Stream:
        self.asked.append(asked)
        self.streams.append(Stream(asked, self._tokens[len(self.streams)], self._signs))
        return self.streams[-1]

    def broadcast(self, _: str) -> Handle:
        return self

    def results(self, **_: Any) -> list[Any]:
        self.looks += 1
        return self._stats


def answer(handle: Any) -> tuple[list[int], Replicas]:
    replicas = Replicas(handle, Scale())

    async def ask() -> list[int]:
        return [token async for piece in replicas.generate(Count(), 1) for token in piece.tokens]

    return simulated(ask()), replicas


def test_an_answer_whose_replica_falls_silent_goes_on_elsewhere() -> None:
    handle = Handle(2, 3, None)
    tokens, replicas = answer(handle)
    assert tokens == list(range(LENGTH))
    assert [each.given for each in handle.asked] == [(), (0, 1), (0, 1, 2, 3, 4)]
    assert [stream.cancelled for stream in handle.streams] == [True] * 3
    assert replicas.continued == 2 and handle.looks == 0


def test_places_are_given_out_and_taken_back() -> None:
    handle: Any = Handle()
    replicas = Replicas(handle, Scale(1, 1, concurrent=1, queued=1, retry_after=3))
    with replicas.admitted():
        with suppress(ZeroDivisionError), replicas.admitted():
            with pytest.raises(Overloaded) as refused, replicas.admitted():
                raise AssertionError("there were two places")
            assert refused.value.seconds == 3
            raise ZeroDivisionError
        with replicas.admitted():
            pass


def test_signs_of_life_keep_an_answer_where_it_is() -> None:
    handle = Handle(None, signs=5)
    assert answer(handle)[0] == list(range(LENGTH))
    assert len(handle.streams) == 1


def test_a_request_that_nobody_took_is_made_anew_if_a_replica_does_not_answer() -> None:
    handle = Handle(0, None, stats=[{}, TimeoutError()])
    tokens, replicas = answer(handle)
    assert tokens == list(range(LENGTH))
    assert len(handle.streams) == 2 and handle.looks >= 1 and replicas.continued == 1


def test_a_request_that_waits_for_its_turn_keeps_it() -> None:
    """All replicas answer: they are busy, and it has a place in their queue."""

    async def late() -> AsyncIterator[int]:
        await asyncio.sleep(3.5 * SECONDS)
        yield 7

    async def all_answer() -> bool:
        nonlocal looks
        looks += 1
        return False

    async def ask() -> list[int]:
        return [item async for item in attended(late(), SECONDS, all_answer)]

    looks = 0
    assert simulated(ask()) == [7] and looks == 3


def test_there_is_an_end_to_trying() -> None:
    with pytest.raises(Unavailable) as raised:
        answer(Handle(*[0] * ATTEMPTS, stats=[ActorDiedError()]))
    assert isinstance(raised.value.__cause__, Silent)


def test_what_is_shorter_than_two_signs_is_refused() -> None:
    with pytest.raises(ValueError, match="silence-seconds"):
        Scale(silence_seconds=1.9 * SIGN_SECONDS)
