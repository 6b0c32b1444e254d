"""Keys and values of running sequences, in pools by length.

A sequence lies in the pool of the smallest *extent* (64, 128, 256, ... positions, at most the context) that
holds it, and moves on to the next pool when it outgrows it, so that memory is at most twice what is
used and a whole pool is attended to in one call without a copy. A pool's sequences are kept side by
side: when one leaves, the last one takes its slot.

Shape suffixes: S slots, H heads, E extent, K width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

SMALLEST_EXTENT = 64


def extent_of(length: int, context: int) -> int:
    """The extent of the pool for ``length`` positions."""
    assert 1 <= length <= context, f"{length} positions in a context of {context}"
    extent = SMALLEST_EXTENT
    while extent < length:
        extent *= 2
    return min(extent, context)


@dataclass(eq=False, slots=True)
class Entry:
    """Where a sequence's keys and values are. ``length`` counts the positions that are filled."""

    extent: int
    slot: int
    length: int


@dataclass(slots=True)
class Pool:
    """``keys_SHEK[layer]`` and ``values_SHEK[layer]``; ``entries`` in the order of their slots."""

    keys_SHEK: list[Tensor]
    values_SHEK: list[Tensor]
    entries: list[Entry] = field(default_factory=list)


class KeyValueCache:
    """For one model, and one thread. Sequences come by ``insert`` and go by ``remove``."""

    def __init__(self, layers: int, heads: int, head_width: int, context: int, device: torch.device) -> None:
        self._layers, self._heads, self._head_width = layers, heads, head_width
        self._context, self._device = context, device
        self._pools: dict[int, Pool] = {}

    @property
    def pools(self) -> list[tuple[int, Pool]]:
        """(extent, pool) of all pools with a sequence in them, ascending."""
        return [(extent, pool) for extent, pool in sorted(self._pools.items()) if pool.entries]

    def pool(self, extent: int) -> Pool:
        return self._pools[extent]

    @property
    def sequences(self) -> int:
        return sum(len(pool.entries) for pool in self._pools.values())

    def insert(self, length: int) -> Entry:
        """Room for a sequence of ``length`` positions, which the caller fills by ``fill``."""
        entry = Entry(extent_of(length, self._context), 0, length)
        self._place(entry)
        return entry

    def fill(self, entry: Entry, layer: int, keys_HTK: Tensor, values_HTK: Tensor) -> None:
        """The keys and values of the entry's first T positions in one layer."""
        pool = self._pools[entry.extent]
        pool.keys_SHEK[layer][entry.slot, :, : keys_HTK.shape[1]] = keys_HTK
        pool.values_SHEK[layer][entry.slot, :, : values_HTK.shape[1]] = values_HTK

    def extend(self, entry: Entry) -> None:
        """Makes room for one more position; the sequence may move to another pool."""
        if entry.length < entry.extent:
            return
        old, slot, filled = self._pools[entry.extent], entry.slot, entry.extent
        moved = Entry(extent_of(entry.length + 1, self._context), 0, entry.length)
        self._place(moved)
        new = self._pools[moved.extent]
        for layer in range(self._layers):
            new.keys_SHEK[layer][moved.slot, :, :filled] = old.keys_SHEK[layer][slot]
            new.values_SHEK[layer][moved.slot, :, :filled] = old.values_SHEK[layer][slot]
        self.remove(entry)
        entry.extent, entry.slot = moved.extent, moved.slot
        new.entries[moved.slot] = entry

    def remove(self, entry: Entry) -> None:
        pool = self._pools[entry.extent]
        last = pool.entries.pop()
        if last is not entry:
            for tensors_SHEK in (pool.keys_SHEK, pool.values_SHEK):
                for tensor_SHEK in tensors_SHEK:
                    tensor_SHEK[entry.slot, :, : last.length] = tensor_SHEK[last.slot, :, : last.length]
            last.slot = entry.slot
            pool.entries[last.slot] = last

    def _place(self, entry: Entry) -> None:
        pool = self._pools.get(entry.extent)
        if pool is None:
            pool = self._pools[entry.extent] = Pool(
                [self._empty(1, entry.extent) for _ in range(self._layers)],
                [self._empty(1, entry.extent) for _ in range(self._layers)],
            )
        slots = pool.keys_SHEK[0].shape[0]
        if len(pool.entries) == slots:
            for tensors_SHEK in (pool.keys_SHEK, pool.values_SHEK):
                for layer, tensor_SHEK in enumerate(tensors_SHEK):
                    tensors_SHEK[layer] = torch.cat((tensor_SHEK, self._empty(slots, entry.extent)))
        entry.slot = len(pool.entries)
        pool.entries.append(entry)

    def _empty(self, slots: int, extent: int) -> Tensor:
        # zeros: what lies beyond a sequence's length is masked, but 0 x NaN would be NaN
        return torch.zeros(slots, self._heads, extent, self._head_width, device=self._device)
