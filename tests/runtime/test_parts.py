"""When a checkpoint is whole."""

from __future__ import annotations

from runtime.checkpoint import ShardFile
from runtime.layout import ALIGNMENT, Block, Layout
from runtime.parts import CheckpointParts, covers
from runtime.protocol import Written
from runtime.signals import Durable

HALF = ALIGNMENT
LAYOUT = Layout(2, tuple(Block(i, f"l{i}", (i,), (), 2 * HALF) for i in range(2)), ())


def part(worker: int, version: int, *pieces: tuple[int, int, int], generation: int = 1) -> Written:
    file = ShardFile(f"{worker}.safetensors", "", 0, pieces)
    return Written(worker, generation, version, (1, 2), file)


FIRST = ((0, 0, 2 * HALF), (1, 0, HALF))
SECOND = ((1, HALF, 2 * HALF),)


def test_whole_once_all_pieces_are_there() -> None:
    parts = CheckpointParts(LAYOUT)
    parts.written(part(0, 5, *FIRST))
    assert parts.due(9) == []
    parts.written(part(0, 5, *FIRST))
    assert parts.due(9) == [], "the same part again is no other part"
    parts.written(part(1, 5, *SECOND))
    assert parts.due(4) == [], "its step is not on record yet"
    (order,) = parts.due(5)
    assert (order.version, order.exponents) == (5, (1, 2))
    assert [file.name for file in order.files] == ["0.safetensors", "1.safetensors"]
    assert parts.due(9) == [], "ordered once"


def test_parts_of_two_plans_make_no_whole() -> None:
    parts = CheckpointParts(LAYOUT)
    parts.written(part(0, 5, *FIRST, generation=1))
    parts.written(part(1, 5, *SECOND, generation=2))
    assert parts.due(9) == []


def test_as_many_elements_twice_over_are_not_all_of_them() -> None:
    parts = CheckpointParts(LAYOUT)
    parts.written(part(0, 5, *FIRST))
    parts.written(part(1, 5, (0, 0, 2 * HALF)))
    assert parts.due(9) == []


def test_what_the_plan_did_not_finish_is_given_up_but_not_what_is_being_made_whole() -> None:
    parts = CheckpointParts(LAYOUT)
    parts.written(part(0, 5, *FIRST, *SECOND))
    assert [order.version for order in parts.due(9)] == [5]
    parts.written(part(0, 6, *FIRST))
    assert parts.give_up() == [6]
    parts.whole(Durable(5, "root", None))
    assert parts.reaches(5) and not parts.reaches(6)
    parts.written(part(0, 5, *FIRST))
    assert parts.due(9) == [], "older than the durable one"


def test_a_failed_one_can_be_made_again() -> None:
    parts = CheckpointParts(LAYOUT)
    parts.written(part(0, 5, *FIRST, *SECOND))
    assert len(parts.due(9)) == 1
    parts.failed(5)
    assert parts.due(9) == []
    parts.written(part(0, 5, *FIRST, *SECOND, generation=2))
    assert len(parts.due(9)) == 1


def test_covers_sees_holes() -> None:
    assert covers(LAYOUT, [*FIRST, *SECOND])
    assert covers(LAYOUT, [*SECOND, (1, 0, 2 * HALF), *FIRST])
    assert not covers(LAYOUT, FIRST)
    assert not covers(LAYOUT, [(0, 0, 2 * HALF), (1, 0, HALF - 1), (1, HALF, 2 * HALF)])
