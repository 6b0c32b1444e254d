"""Which samples a micro-batch holds: the words of the data, the ledger and the audit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

Samples = tuple[tuple[int, tuple[int, ...]], ...]
"""The samples of one micro-batch in order: (epoch, ids) for every epoch that it takes some from, two where one
epoch ends in it. Ids count from 0 within the data set."""


class Read(NamedTuple):
    """One side of a micro-batch (the inputs or the targets), and the samples that it was made of."""

    value: Any
    samples: Samples


def grouped(pairs: Iterable[tuple[int, int]]) -> Samples:
    """(epoch, id) pairs, epochs ascending, as ``Samples``."""
    groups: dict[int, list[int]] = {}
    for epoch, sample in pairs:
        groups.setdefault(epoch, []).append(sample)
    return tuple((epoch, tuple(ids)) for epoch, ids in groups.items())


def count(samples: Samples) -> int:
    return sum(len(ids) for _, ids in samples)
