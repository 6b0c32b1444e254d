"""What a worker tells of its part of a checkpoint, and tells again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors.line import Line
from actors.shard_writer import ShardWriter
from runtime.protocol import Finished, Here, Unwritten

NOTHING: Any = None


class Told:
    """An endpoint that remembers what it was to send."""

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def send(self, worker: int, tag: object, *, note: object, fleeting: bool = False) -> None:
        self.notes.append(note)


def no_room(where: str, step: int, micro_batch: int) -> None:
    raise OSError("no space left on device")


@pytest.mark.parametrize("is_last", [True, False])
def test_the_next_controller_hears_that_the_last_checkpoint_could_not_be_written(is_last: bool) -> None:
    """Or it would wait for that one for ever. Of an earlier one the record tells already."""
    line, told = Line(3, -1), Told()
    line.endpoint = told  # type: ignore[assignment]
    writer = ShardWriter(3, "nowhere", line, no_room)
    rounds: Any = SimpleNamespace(owned=(), plan=SimpleNamespace(generation=2))
    writer.write(rounds, NOTHING, 8, NOTHING, is_last=is_last)
    writer.finish(2, 8)
    writer.close()
    unwritten = Unwritten(3, 8, "worker 3 could not write: no space left on device")
    assert told.notes == [unwritten, Finished(3, 2, 8)]
    here: Here = NOTHING
    line.introduce(here, ())
    assert told.notes[2:] == [here, *([unwritten] if is_last else []), Finished(3, 2, 8)]
