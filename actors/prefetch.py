"""A cache in front of a data set: what a worker will read is prepared elsewhere, ahead of time.

Data sets are pure functions, so it does not matter who prepares a micro-batch: what does not come (in time)
is read here. This class knows nothing of Ray; ``actors.fed`` says whom it asks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from runtime.samples import Read, Samples
from strategies.boundary import Spec, Value, flatten, unflatten
from strategies.pipeline import Data
from strategies.reading import Side, Wanted, read

PATIENCE_SECONDS = 1.0
"""How long a read waits for what was asked for. Less than any worker may be stuck in one call."""

MOST_AHEAD = 32
"""Reads that are asked for and not yet taken: what bounds the memory."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A read as it travels: arrays that Ray can share between processes without copies. ``digest`` is that of
    the data set that it was read from."""

    arrays: list[npt.NDArray[Any]]
    spec: Spec
    samples: Samples
    digest: str | None


def prepare(data: Data, wanted: Sequence[Wanted]) -> list[Prepared]:
    """What a feed worker does."""
    digest = getattr(data, "digest", None)
    prepared = []
    for each in wanted:
        found = read(data, each)
        tensors, spec = flatten(found.value)
        prepared.append(Prepared([tensor.numpy() for tensor in tensors], spec, found.samples, digest))
    return prepared


class Prefetcher:
    """The same data set as ``data``, to its reader. For one thread.

    ``ask`` returns the future of some reads, or None where nobody is there to prepare them; both sides of a
    micro-batch are asked for at once, since a call takes longer than most targets do. ``served`` and
    ``missed`` count the reads that had been prepared, and those that had to be done here.
    """

    def __init__(
        self,
        data: Data,
        ask: Callable[[Sequence[Wanted]], Future[list[Prepared]] | None],
        *,
        patience: float = PATIENCE_SECONDS,
        most: int = MOST_AHEAD,
    ) -> None:
        self._data, self._ask = data, ask
        self._patience, self._most = patience, most
        self._coming: dict[Wanted, tuple[Future[list[Prepared]], int]] = {}
        self._to_ask: deque[Wanted] = deque()
        self.served = self.missed = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._data, name)  # digest, samples and whatever else it tells

    def expect(self, wanted: Sequence[Wanted]) -> None:
        """These will be read next, in about this order; nothing else of what was announced before."""
        still = set(wanted)
        for each in [each for each in self._coming if each not in still]:
            del self._coming[each]
        self._to_ask = deque(each for each in wanted if each not in self._coming)
        self._ask_ahead()

    def inputs(self, step: int, micro_batch: int) -> Read:
        return self._read(Wanted(Side.INPUTS, step, micro_batch))

    def targets(self, step: int, micro_batch: int) -> Read:
        return self._read(Wanted(Side.TARGETS, step, micro_batch))

    def micro_batch(self, step: int, micro_batch: int) -> tuple[Value, Value]:
        return self._data.micro_batch(step, micro_batch)

    def held_out(self, micro_batch: int) -> tuple[Value, Value]:
        return self._data.held_out(micro_batch)

    def _ask_ahead(self) -> None:
        while self._to_ask and len(self._coming) < self._most:
            first = self._to_ask[0]
            together = [each for each in islice(self._to_ask, len(Side)) if each[1:] == first[1:]]
            future = self._ask(together)
            if future is None:
                return  # whoever may be there later is asked with the next read
            for place, each in enumerate(together):
                self._to_ask.popleft()
                self._coming[each] = future, place

    def _read(self, wanted: Wanted) -> Read:
        coming = self._coming.pop(wanted, None)
        if coming is None and wanted in self._to_ask:
            self._to_ask.remove(wanted)
        prepared = None if coming is None else self._received(*coming)
        self._ask_ahead()
        if prepared is None:
            self.missed += 1
            return read(self._data, wanted)
        self.served += 1
        # copies: what lies in shared memory must not be written to, and torch cannot be told so
        tensors = [torch.from_numpy(np.array(array)) for array in prepared.arrays]
        return Read(unflatten(tensors, prepared.spec), prepared.samples)

    def _received(self, future: Future[list[Prepared]], place: int) -> Prepared | None:
        try:
            prepared = future.result(timeout=self._patience)[place]
        except Exception:  # late, lost with whoever prepared it, or failed there: then it shows here too
            return None
        return prepared if prepared.digest == getattr(self._data, "digest", None) else None


class Rota:
    """Feed workers are asked in turn, those that failed not before ``seconds`` have passed."""

    def __init__(self, count: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._back_at = [0.0] * count
        self._seconds, self._clock = seconds, clock
        self._turn = 0

    def next(self) -> int | None:
        """None where all have failed."""
        now = self._clock()
        for _ in self._back_at:
            self._turn = (self._turn + 1) % len(self._back_at)
            if self._back_at[self._turn] <= now:
                return self._turn
        return None

    def failed(self, number: int) -> None:
        self._back_at[number] = self._clock() + self._seconds
