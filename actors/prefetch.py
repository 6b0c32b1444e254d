"""A cache in front of a data set: what a worker will read is prepared elsewhere, ahead of time.

Data sets are pure functions, so it does not matter who prepares a micro-batch: what does not come (in time)
is read here, and a reader that has to wait prepares meanwhile what nobody has been asked for yet. This class
knows nothing of Ray; ``actors.fed`` says whom it asks.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import groupby
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
"""Reads that are asked for and not yet taken."""

MOST_AHEAD_BYTES = 256 << 20
"""What they may take in memory; reads of two micro-batches are always asked for."""

MOST_TOGETHER = MOST_AHEAD // 4
"""Reads in one call, where there is one feed worker: it has others while these are on their way."""

LOOK_SECONDS = 0.02
"""Between two looks, while a reader waits, at whether it has been interrupted."""

TOGETHER_SECONDS = 0.1
"""So much preparing is asked for in one call, that the call itself (2 ms of the feed worker's time, with
storing what it answers) is a small part of it; no more, since all of it comes when the last read is there."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A read as it travels: arrays that Ray can share between processes without copies. ``digest`` is that of
    the data set that it was read from, ``seconds`` what reading took."""

    arrays: list[npt.NDArray[Any]]
    spec: Spec
    samples: Samples
    digest: str | None
    seconds: float


def prepare(data: Data, wanted: Sequence[Wanted]) -> list[Prepared]:
    """What a feed worker does."""
    digest = getattr(data, "digest", None)
    prepared = []
    for each in wanted:
        began = time.perf_counter()
        found = read(data, each)
        seconds = time.perf_counter() - began
        tensors, spec = flatten(found.value)
        arrays = [tensor.numpy() for tensor in tensors]
        prepared.append(Prepared(arrays, spec, found.samples, digest, seconds))
    return prepared


class Prefetcher:
    """The same data set as ``data``, to its reader. For one thread.

    ``ask`` returns the future of some reads, or None where nobody is there to prepare them. ``most`` reads
    (two at least) may be asked for and not yet taken, ``together`` of them in one call, and half as many more
    are prepared here while there is nothing else to do. ``served``, ``missed`` and ``helped`` count the reads
    that had been prepared elsewhere, those that had to be done here at last, and those that were done here
    before they were wanted.
    """

    def __init__(
        self,
        data: Data,
        ask: Callable[[Sequence[Wanted]], Future[list[Prepared]] | None],
        *,
        patience: float = PATIENCE_SECONDS,
        most: int = MOST_AHEAD,
        together: int = MOST_TOGETHER,
    ) -> None:
        self._data, self._ask = data, ask
        self._patience, self._most, self._together = patience, most, together
        self._seconds, self._bytes = math.inf, 1.0  # of a read, as it was lately
        self._coming: dict[Wanted, tuple[Future[list[Prepared]], int]] = {}
        self._to_ask: deque[Wanted] = deque()
        self._here: dict[Wanted, Read] = {}
        self._check: Callable[[], None] = lambda: None
        self.served = self.missed = self.helped = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._data, name)  # digest, samples and whatever else it tells

    def expect(self, wanted: Sequence[Wanted]) -> None:
        """These will be read next, in about this order; nothing else of what was announced before."""
        still = set(wanted)
        self._coming = {each: coming for each, coming in self._coming.items() if each in still}
        self._here = {each: found for each, found in self._here.items() if each in still}
        self._to_ask = deque(each for each in wanted if each not in self._coming and each not in self._here)
        self._ask_ahead()

    def heed(self, check: Callable[[], None]) -> None:
        """``check`` is called while a read waits; what it raises ends the read, and nothing is lost by it."""
        self._check = check

    def inputs(self, step: int, micro_batch: int) -> Read:
        return self._read(Wanted(Side.INPUTS, step, micro_batch))

    def targets(self, step: int, micro_batch: int) -> Read:
        return self._read(Wanted(Side.TARGETS, step, micro_batch))

    def micro_batch(self, step: int, micro_batch: int) -> tuple[Value, Value]:
        return self._data.micro_batch(step, micro_batch)

    def held_out(self, micro_batch: int) -> tuple[Value, Value]:
        return self._data.held_out(micro_batch)

    def _ask_ahead(self) -> None:
        while self._to_ask:
            together = self._next_call(min(self._together, int(TOGETHER_SECONDS / max(self._seconds, 1e-6))))
            if len(self._coming) + len(together) > self._most_now():
                return
            future = self._ask(together)
            if future is None:
                return  # whoever may be there later is asked with the next read
            for place, each in enumerate(together):
                self._to_ask.popleft()
                self._coming[each] = future, place

    def _most_now(self) -> int:
        return min(self._most, max(2 * len(Side), int(MOST_AHEAD_BYTES / self._bytes)))

    def _next_call(self, size: int) -> list[Wanted]:
        """Both sides of the next micro-batch, and of those after it up to ``size`` reads; no more than are on
        their way already, so that after a beginning the first ones come soon."""
        size = min(size, len(self._coming))
        together: list[Wanted] = []
        for _, sides in groupby(self._to_ask, key=lambda each: each[1:]):
            of_micro_batch = list(sides)
            if together and len(together) + len(of_micro_batch) > size:
                break
            together += of_micro_batch
        return together

    def _read(self, wanted: Wanted) -> Read:
        found = self._here.pop(wanted, None)
        if found is not None:
            self.helped += 1
            self._ask_ahead()
            return found
        if wanted in self._coming:
            self._await(self._coming[wanted][0])
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

    def _help(self) -> bool:
        """Prepares a micro-batch that nobody has been asked for; False if none is to be had or kept."""
        wanted = self._next_call(0)
        if not wanted or len(self._here) + len(wanted) > self._most_now() // 2:
            return False
        try:
            found = [read(self._data, each) for each in wanted]
        except Exception:  # it shows when it is wanted, if it is still so then
            return False
        for each, one in zip(wanted, found, strict=True):
            self._here[each] = one
            self._to_ask.popleft()
        return True

    def _await(self, future: Future[list[Prepared]]) -> None:
        """Until it is done or patience is over. Raises what ``check`` does."""
        began, helps = time.monotonic(), True
        while not future.done() and (waited := time.monotonic() - began) < self._patience:
            self._check()
            # as long as what it may begin then takes: where training is the bottleneck, waits are shorter
            idle = self._seconds - waited
            if idle <= 0 and helps:
                helps = self._help()
            else:
                looking = min(LOOK_SECONDS, self._patience - waited)
                wait([future], timeout=min(idle, looking) if idle > 0 else looking)

    def _received(self, future: Future[list[Prepared]], place: int) -> Prepared | None:
        try:
            together = future.result(timeout=0.0)
        except TimeoutError:
            future.cancel()  # tells whoever asked that it was late
            late = [each for each, (call, _) in self._coming.items() if call is future]
            for each in late:  # nobody waits for it once more; others may have them in time
                del self._coming[each]
            self._to_ask.extendleft(reversed(late))
            return None
        except Exception:  # lost with whoever prepared it, or failed there: then it shows here too
            return None
        self._seconds = sum(each.seconds for each in together) / len(together)
        arrays = [array for each in together for array in each.arrays]
        self._bytes = max(1.0, sum(array.nbytes for array in arrays) / len(together))
        prepared = together[place]
        return prepared if prepared.digest == getattr(self._data, "digest", None) else None


class Rota:
    """Feed workers are asked in turn, those that failed not before ``seconds`` have passed; twice as long for
    each time that they fail again, ``most_seconds`` at most."""

    def __init__(
        self,
        count: int,
        seconds: float,
        most_seconds: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._back_at = [0.0] * count
        self._rests = [0.0] * count
        self._seconds, self._most_seconds, self._clock = seconds, most_seconds, clock
        self._turn = 0

    def next(self) -> int | None:
        """None where all have failed."""
        now = self._clock()
        for _ in self._back_at:
            self._turn = (self._turn + 1) % len(self._back_at)
            if self._back_at[self._turn] <= now:
                return self._turn
        return None

    def answered(self, number: int) -> None:
        self._rests[number] = 0.0

    def failed(self, number: int) -> None:
        now = self._clock()
        if self._back_at[number] <= now:  # else it is something that it had been asked before
            self._rests[number] = min(2 * self._rests[number] or self._seconds, self._most_seconds)
        self._back_at[number] = now + self._rests[number]
