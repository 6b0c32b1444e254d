"""What a newcomer does until it is told where it comes in."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import torch

from actors.follower import Follower
from runtime.fabric.interface import Message, Tag
from runtime.plan import Plan, Shard, Stage
from runtime.protocol import Change, Entry
from runtime.snapshots import ROWS, ShardStore
from strategies.options import WHOLE, Keeps

NEWCOMER, USHER, SIZE = 1, 0, 64
ENTRY = Message(USHER, Tag(2, 0, 0, "entry"), [], Entry(7, None, None))
PLAN = Plan(
    2,
    (Stage(0, 2, (USHER, NEWCOMER)),),
    ((USHER,),),
    (Shard(0, 0, SIZE, USHER, NEWCOMER), Shard(1, 0, SIZE, NEWCOMER, USHER)),
)
CHANGE = Change(PLAN, {}, (), stop_at=9, usher=USHER)


class Stage2:
    """Holds block 1 since an older version; block 0 is new with the plan."""

    def __init__(self) -> None:
        self.version: dict[int, int | None] = {1: 5}
        self.working = {1: torch.ones(SIZE)}
        self.accumulators = {1: torch.ones(SIZE)}

    def hold(self, *stages: tuple[int, int], keeps: Keeps) -> None:
        assert (stages, keeps) == (((0, 2),), WHOLE)
        self.version[0] = None
        self.working[0], self.accumulators[0] = torch.ones(SIZE), torch.ones(SIZE)


class Line:
    """An endpoint on which the entry comes with the n-th look; None: only to who waits."""

    def __init__(self, looks: int | None) -> None:
        self._looks = looks
        self.waited = False

    def poll_any(self, tags: Sequence[Tag]) -> Message | None:
        assert list(tags) == [ENTRY.tag]
        if self._looks is None:
            return None
        self._looks -= 1
        return ENTRY if self._looks == 0 else None

    def receive(self, sender: int, tag: Tag) -> Message:
        assert (sender, tag) == (USHER, ENTRY.tag)
        self.waited = True
        return ENTRY


def newcomer(line: Line) -> tuple[Stage2, ShardStore, list[object]]:
    stage, store, begun = Stage2(), ShardStore(), list[object]()
    progress = SimpleNamespace(begin=lambda *of: begun.append(of))
    job = SimpleNamespace(keeps_under=lambda plan: WHOLE)
    follower = SimpleNamespace(
        worker=NEWCOMER, job=job, stage=stage, store=store, endpoint=line, layout=None, _progress=progress
    )
    assert Follower._entry(cast(Follower, follower), CHANGE) == ENTRY.note
    return stage, store, begun


def test_it_makes_room_for_what_is_new() -> None:
    line = Line(None)
    stage, store, begun = newcomer(line)
    assert line.waited
    assert not stage.working[0].any() and not stage.accumulators[0].any()
    assert stage.working[1].all() and stage.accumulators[1].all()  # still version 5
    assert [store.buffer(SIZE).tolist() for _ in range(2)] == [[[0.0] * SIZE] * ROWS] * 2
    assert begun == [(0, 0, {})]


def test_it_comes_in_as_soon_as_it_is_told() -> None:
    line = Line(2)
    stage, _, _ = newcomer(line)
    assert not line.waited
    assert not stage.working[0].any()
    assert stage.accumulators[0].all()  # the entry had come before its turn
