"""Which samples a micro-batch holds: the words of the data, the ledger and the audit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Samples = tuple[tuple[int, tuple[int, ...]], ...]
"""The samples of one micro-batch in order: (epoch, ids) for every epoch that it takes some from, two where
one epoch ends in it. Ids count from 0 within the data set."""

StepSamples = tuple[tuple[int, Samples], ...]
"""(micro-batch, its samples) of one step, as those tell who computed the losses."""


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


def to_json(step: int, read: StepSamples) -> dict[str, Any]:
    """``{"step": 7, "micro_batches": [[0, [[0, [12, 5]]]], ...]}``: (micro-batch, (epoch, ids) pairs)."""
    return {"step": step, "micro_batches": read}


def from_json(record: Mapping[str, Any]) -> tuple[int, StepSamples]:
    """Raises ValueError, TypeError or KeyError for what ``to_json`` did not make."""
    read = tuple(
        (int(micro_batch), tuple((int(epoch), tuple(map(int, ids))) for epoch, ids in samples))
        for micro_batch, samples in record["micro_batches"]
    )
    return int(record["step"]), read
