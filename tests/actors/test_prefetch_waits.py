"""What a reader does while it waits for what others prepare."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from actors.prefetch import Prefetcher, prepare
from runtime.fabric.interface import Interrupted
from runtime.samples import Read
from strategies.reading import Side, Wanted, read
from tests.support.asked import Asked, Told, tensor

STEP_ONE = [Wanted(Side.INPUTS, 1, m) for m in range(4)]
STEP_TWO = [Wanted(Side.INPUTS, 2, m) for m in range(8)]


class Measured(Told):
    """Notes what is read of it; what is ``broken`` cannot be. ``then`` is done soon after ``count`` reads."""

    def __init__(self, seed: int, broken: Wanted | None = None) -> None:
        super().__init__(seed)
        self.noted: list[Wanted] = []
        self.broken = broken
        self.count = 0

    def after(self, count: int, then: Callable[[], None]) -> None:
        self.count, self.then = count, then

    def inputs(self, step: int, micro_batch: int) -> Read:
        wanted = Wanted(Side.INPUTS, step, micro_batch)
        self.noted.append(wanted)
        if len(self.noted) == self.count:
            threading.Timer(0.05, self.then).start()
        if wanted == self.broken:
            raise OSError("not to be had now")
        return super().inputs(step, micro_batch)


def waiting(data: Told, most: int) -> tuple[Prefetcher, Asked]:
    """With all of step 2 wanted, and it known that reads take 10 ms elsewhere."""
    asked = Asked(Told(3))
    cache = Prefetcher(data, asked, most=most, together=1, patience=60.0)
    cache.expect(STEP_ONE[:1])
    (known,) = prepare(Told(3), STEP_ONE[:1])
    asked.futures[STEP_ONE[0]].set_result([replace(known, seconds=0.01)])
    cache.inputs(1, 0)
    cache.expect(STEP_TWO)
    return cache, asked


def test_who_waits_prepares_what_nobody_was_asked_for() -> None:
    data = Measured(3)
    cache, asked = waiting(data, most=4)
    assert asked.order[1:] == STEP_TWO[:4]
    data.after(2, partial(asked.answer, STEP_TWO[0]))
    assert cache.inputs(2, 0).samples == ((2, (0,)),) and cache.served == 2
    assert data.noted == STEP_TWO[4:6], "half as many as may be asked for"
    assert asked.order[1:] == [*STEP_TWO[:4], STEP_TWO[6]], "others are asked for what comes after that"
    cache.expect(STEP_TWO[1:])
    assert len(asked.order) == 6, "what is here is asked of nobody"
    for each in STEP_TWO[1:]:
        if each in asked.futures and not asked.futures[each].done():
            asked.answer(each)
        found = read(cache, each)
        assert torch.equal(tensor(found), tensor(Told(3).inputs(*each[1:])))
        assert found.samples == ((2, (each.micro_batch,)),)
    assert (cache.served, cache.helped, cache.missed) == (7, 2, 0) and len(data.noted) == 2


def test_who_does_not_wait_for_long_prepares_nothing() -> None:
    data = Measured(3)
    cache, asked = waiting(data, most=4)
    asked.answer(STEP_TWO[0])
    cache.inputs(2, 0)
    assert not data.noted and cache.served == 2


def test_what_was_prepared_meanwhile_and_is_not_wanted_any_more_is_forgotten() -> None:
    data = Measured(3)
    cache, asked = waiting(data, most=4)
    data.after(2, partial(asked.answer, STEP_TWO[0]))
    cache.inputs(2, 0)
    cache.expect([STEP_TWO[5]])
    cache.inputs(2, 5)
    assert cache.helped == 1
    cache.inputs(2, 4)
    assert cache.helped == 1 and cache.missed == 1


def test_what_cannot_be_read_meanwhile_is_asked_of_others() -> None:
    data = Measured(3, broken=STEP_TWO[4])
    cache, asked = waiting(data, most=4)
    data.after(1, partial(asked.answer, STEP_TWO[0]))
    cache.inputs(2, 0)
    assert data.noted == [STEP_TWO[4]] and STEP_TWO[4] in asked.futures
    with pytest.raises(OSError, match="not to be had"):
        asked.futures[STEP_TWO[4]].set_exception(RuntimeError("nor elsewhere"))
        cache.inputs(2, 4)


def test_a_wait_is_interrupted_and_what_is_coming_still_comes() -> None:
    asked = Asked(Told(3))
    cache = Prefetcher(Told(3), asked, patience=60.0)
    cache.expect(STEP_ONE)
    looks = iter(range(3))

    def check() -> None:
        if next(looks) == 2:
            raise Interrupted(2)

    cache.heed(check)
    with pytest.raises(Interrupted):
        cache.inputs(1, 0)
    cache.heed(lambda: None)
    cache.expect(STEP_ONE)
    assert asked.order == STEP_ONE, "none is asked for twice"
    asked.answer(STEP_ONE[0])
    assert cache.inputs(1, 0).samples == ((1, (0,)),) and (cache.served, cache.missed) == (1, 0)
