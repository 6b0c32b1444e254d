"""Which samples make up which rows: an order over the whole set and a plan of packing, both pure functions.

The samples of an epoch, shuffled, are cut into rows one after the other; a row is full when the next sample
does not fit. Rows never mix epochs, but micro-batches do: the epochs' rows form one endless sequence that is
dealt out to steps, so that every sample is used exactly once in every epoch and none is dropped at its end.
Only the last row of an epoch may be emptier than the rest.
"""

from __future__ import annotations

import bisect
import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.streams import permutation

PLANS_KEPT = 4
"""Epochs whose plan is kept: the one under way, its neighbours, and that of the held-out data."""


class PackedRow(NamedTuple):
    epoch: int
    samples: tuple[int, ...]


def cut(lengths: npt.NDArray[np.int64], capacity: int, slots: int) -> npt.NDArray[np.int64]:
    """Where rows begin, and the end of the last one, when samples of ``lengths`` are packed in this order.

    A row takes as many as there are ``slots`` and as fit into ``capacity`` (next fit). Every length must be
    from 1 to ``capacity``.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    count = len(lengths)
    # where the row after one that begins with sample i begins
    following = np.searchsorted(ends, ends[:-1] + capacity, side="right") - 1
    following = np.minimum(following, np.arange(count) + slots).tolist()
    starts, start = [0], 0
    while start < count:
        start = following[start]
        starts.append(start)
    return np.asarray(starts, dtype=np.int64)


class PackedOrder:
    """Random access to the rows of any micro-batch of any step. May be shared between threads.

    ``lengths`` are the samples' text positions; ``rows`` of ``capacity`` positions and ``slots`` samples
    each make a micro-batch. Raises ValueError for a sample that fits into no row.
    """

    def __init__(
        self,
        seed: int,
        lengths: npt.NDArray[np.int64],
        *,
        capacity: int,
        slots: int,
        rows: int,
        micro_batches: int,
    ) -> None:
        for name, size in (("slots", slots), ("micro_batch_size", rows), ("micro_batches", micro_batches)):
            if size < 1:
                raise ValueError(f"the data's {name} is {size}: it must be at least 1")
        if not len(lengths):
            raise ValueError("the curated set's split has no rows: curate more data")
        if int(lengths.max()) > capacity:
            raise ValueError(
                f"a caption takes {int(lengths.max())} positions but a row has {capacity}: raise the data's "
                "(and the model's) context, or curate with a shorter longest caption"
            )
        self._seed, self._lengths = seed, lengths
        self._capacity, self._slots = capacity, slots
        self._rows, self._micro_batches = rows, micro_batches
        self._plans: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        self._ends: list[int] = []  # of the first epochs' rows in the endless sequence
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return len(self._lengths)

    def rows(self, step: int, micro_batch: int) -> tuple[PackedRow, ...]:
        """The rows of micro-batch ``micro_batch`` of ``step`` (from 1)."""
        assert step >= 1 and 0 <= micro_batch < self._micro_batches
        first = ((step - 1) * self._micro_batches + micro_batch) * self._rows
        with self._lock:
            return tuple(self._row(number) for number in range(first, first + self._rows))

    def rows_of(self, epoch: int) -> int:
        """How many rows the samples of ``epoch`` take."""
        with self._lock:
            return len(self._plan(epoch)[1]) - 1

    def _row(self, number: int) -> PackedRow:
        while not self._ends or self._ends[-1] <= number:
            _, starts = self._plan(len(self._ends))
            self._ends.append((self._ends[-1] if self._ends else 0) + len(starts) - 1)
        epoch = bisect.bisect_right(self._ends, number)
        order, starts = self._plan(epoch)
        row = number - (self._ends[epoch - 1] if epoch else 0)
        return PackedRow(epoch, tuple(order[starts[row] : starts[row + 1]].tolist()))

    def _plan(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(the samples in the epoch's order, where the rows begin in it)."""
        if epoch not in self._plans:
            order = permutation(self.size, self._seed, epoch)
            self._plans[epoch] = order, cut(self._lengths[order], self._capacity, self._slots)
            while len(self._plans) > PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
        return self._plans[epoch]
