"""The store of shard state: whole versions side by side, any interval read from what is kept."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.resharding import Holding
from runtime.snapshots import ROWS, Piece, ShardStore

BLOCK = torch.arange(ROWS * 256, dtype=torch.float32).view(ROWS, 256)
SIZE = 64


def state(piece: Piece, version: int = 1) -> Tensor:
    """The true state of a piece: another one for every block and version."""
    block, start, stop = piece
    return BLOCK[:, start:stop] + 1000 * block + 10000 * version


def store_of(*kept: tuple[Piece, int]) -> ShardStore:
    store = ShardStore()
    for piece, version in kept:
        store.put(piece, version, state(piece, version).clone())
    return store


def test_versions_lie_side_by_side() -> None:
    piece = (0, 0, 64)
    store = store_of((piece, 3), (piece, 4))
    for version in (3, 4):
        kept = store.get(piece, version)
        assert kept is not None and kept.equal(state(piece, version))
    assert (
        store.get(piece, 5) is None and store.get((0, 0, 63), 3) is None and store.get((1, 0, 64), 3) is None
    )


def test_what_is_put_is_kept_without_a_copy() -> None:
    store, kept = ShardStore(), torch.zeros(ROWS, 64)
    store.put((0, 0, 64), 1, kept)
    assert store.get((0, 0, 64), 1) is kept


def test_what_is_read_is_a_copy() -> None:
    store = store_of(((0, 0, 64), 1))
    read = store.read((0, 0, 64), 1)
    assert read is not None
    read.zero_()
    again = store.read((0, 0, 64), 1)
    assert again is not None and again.equal(state((0, 0, 64)))


PIECES = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), max_size=6)


@given(PIECES, st.integers(0, 3), st.integers(1, 4))
def test_any_interval_is_read_if_and_only_if_it_is_covered(
    kept: list[tuple[int, int]], first: int, units: int
) -> None:
    pieces = [(0, 16 * start, 16 * (start + size)) for start, size in kept]
    store = store_of(*((piece, 1) for piece in pieces), ((1, 0, 256), 1), ((0, 0, 256), 2))
    wanted = (0, 16 * first, 16 * (first + units))
    covered = {i for _, start, stop in pieces for i in range(start, stop)}
    read = store.read(wanted, 1)
    if set(range(wanted[1], wanted[2])) <= covered:
        assert read is not None and read.equal(state(wanted))
    else:
        assert read is None


@given(PIECES, st.integers(0, 3), st.integers(1, 4))
def test_parts_are_all_that_is_kept_of_an_interval(
    kept: list[tuple[int, int]], first: int, units: int
) -> None:
    pieces = [(0, 16 * start, 16 * (start + size)) for start, size in kept]
    store = store_of(*((piece, 1) for piece in pieces))
    wanted = (0, 16 * first, 16 * (first + units))
    seen: set[int] = set()
    for start, stop, part in store.parts(wanted, 1):
        assert part.equal(state((0, start, stop)))
        seen |= set(range(start, stop))
    covered = {i for _, start, stop in pieces for i in range(start, stop)}
    assert seen == covered & set(range(wanted[1], wanted[2]))


def test_drop_and_holdings() -> None:
    a, b = (0, 0, 64), (1, 64, 128)
    store = store_of((a, 1), (a, 2), (a, 3), (b, 2))
    store.drop(before=2)
    assert store.holdings() == (Holding(0, 0, 64, 2), Holding(0, 0, 64, 3), Holding(1, 64, 128, 2))
    store.drop(after=2)
    assert store.holdings() == (Holding(0, 0, 64, 2), Holding(1, 64, 128, 2))
    store.drop(before=3)
    assert store.holdings() == ()


def test_the_memory_of_dropped_versions_is_used_again() -> None:
    piece = (0, 0, 64)
    store = store_of((piece, 1), (piece, 2))
    old = store.get(piece, 1)
    assert old is not None
    store.drop(before=2)
    assert store.bytes() == 2 * ROWS * 64 * 4, "one version kept, one spare"
    assert store.buffer(32).shape == (ROWS, 32)
    assert store.buffer(64) is old
    assert store.buffer(64) is not old, "it was given away"


def test_clear_forgets_everything() -> None:
    store = store_of(((0, 0, 64), 1), ((0, 0, 64), 2))
    store.drop(before=2)
    store.clear()
    assert store.holdings() == () and store.bytes() == 0


def test_memory_that_was_prepared_is_taken_first() -> None:
    store = ShardStore()
    prepared = store.prepare([SIZE, SIZE])
    store.drop(after=3)  # as every move begins: nothing is kept that could be dropped
    taken = [store.buffer(SIZE) for _ in range(3)]
    assert [any(buffer is one for one in prepared) for buffer in taken] == [True, True, False]


def test_a_store_that_keeps_states_prepares_none() -> None:
    store = ShardStore()
    store.put((0, 0, SIZE), 1, torch.zeros(3, SIZE))
    assert store.prepare([SIZE]) == []
