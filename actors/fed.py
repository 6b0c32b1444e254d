"""What a worker that trains reads by: the run's feed workers, asked ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from actors.names import NAMESPACE, feed_name
from actors.prefetch import MOST_TOGETHER, Prefetcher, Prepared, Rota
from strategies.pipeline import Data
from strategies.reading import Wanted

AGAIN_SECONDS = 1.0
"""Until a feed worker that failed is asked again; doubles each time."""

LONGEST_SECONDS = 60.0
"""Of these at most. One that hangs costs a reader its patience each time that it is asked."""


class Asker:
    """Asks a run's feed workers in turn. Called by one thread; how a call went is noted by Ray's."""

    def __init__(self, run: str, count: int) -> None:
        self._run = run
        self._rota = Rota(count, AGAIN_SECONDS, LONGEST_SECONDS)
        self._handles: dict[int, Any] = {}

    def __call__(self, wanted: Sequence[Wanted]) -> Future[list[Prepared]] | None:
        while (number := self._rota.next()) is not None:
            try:
                handle = self._handles.get(number)
                if handle is None:
                    handle = ray.get_actor(feed_name(self._run, number), namespace=NAMESPACE)
                    self._handles[number] = handle
                future: Future[list[Prepared]] = handle.prepare.remote(wanted).future()
            except (ValueError, RayError):  # not there yet, or no more
                self._failed(number)
                continue
            future.add_done_callback(partial(self._note, number))
            return future
        return None

    def _note(self, number: int, done: Future[list[Prepared]]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._failed(number)
        else:
            self._rota.answered(number)

    def _failed(self, number: int) -> None:
        self._handles.pop(number, None)
        self._rota.failed(number)


def fed(build_data: Callable[[], Data], run: str, count: int) -> Data:
    """The data set with ``count`` feed workers of ``run`` in front of it."""
    # with several at once nobody is to have all of the next micro-batches
    return Prefetcher(build_data(), Asker(run, count), together=MOST_TOGETHER // count)
