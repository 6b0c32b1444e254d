"""Streams whose replica may hang: a process that is stopped, cut off, or stuck in one call, and does not die.

A replica that works gives a sign of life at least every ``SIGN_SECONDS``, also while a request waits in it.
Ray Serve sees a hung replica too, by its health checks, but takes some 40 s to replace it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

SIGN_SECONDS = 1.0
"""The longest that a replica keeps a request without a word."""


class Silent(Exception):
    """A replica has given no sign of life for too long."""


async def attended(
    stream: AsyncIterator[Any], seconds: float, is_one_silent: Callable[[], Awaitable[bool]]
) -> AsyncIterator[Any]:
    """The items of ``stream``. Raises Silent when none has come for ``seconds``.

    Before the first item a request may just as well wait for a place in any replica, for as long as that
    takes, and would lose its turn by being made anew; so ``is_one_silent`` is asked then whether some replica
    does not answer.
    """
    heard = False
    while True:
        coming = asyncio.ensure_future(_next(stream))
        coming.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may ask any more
        try:
            while not await _done(coming, seconds):
                if heard or await is_one_silent():
                    raise Silent(f"a replica gave no sign of life for {seconds:g} s")
            item = coming.result()
        finally:
            coming.cancel()
        if item is None:
            return
        heard = True
        yield item


async def _next(stream: AsyncIterator[Any]) -> Any:
    """The next item, None at the end."""
    return await anext(stream, None)


async def _done(coming: asyncio.Future[Any], seconds: float) -> bool:
    """Waits twice half as long: after a pause of this process itself one wait is over at once, and what had
    come meanwhile is seen in the other."""
    for _ in range(2):
        if (await asyncio.wait({coming}, timeout=seconds / 2))[0]:
            return True
    return False
