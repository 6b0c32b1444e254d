"""Prefetching: the same bits whoever prepares them, whatever becomes of those who do, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from actors.fed import Asker
from actors.prefetch import Prefetcher, Prepared, Rota, prepare
from runtime.plan import Plan, Stage
from runtime.samples import Read
from strategies.job import Fault
from strategies.reading import AHEAD, READS_AHEAD, Side, Wanted, announce, read
from tests.support.asked import Asked, Told, tensor
from tests.support.chaos import ChaosRun
from tests.support.cluster import toy_job
from tests.support.expected import toy_bits
from tests.support.models import Tokens

STEP_ONE = [Wanted(Side.INPUTS, 1, m) for m in range(4)]


def test_what_is_prepared_is_what_would_have_been_read() -> None:
    data = Told(3)
    asked = Asked(Told(3))
    cache = Prefetcher(data, asked)
    wanted = [*STEP_ONE, Wanted(Side.TARGETS, 1, 2)]
    cache.expect(wanted)
    assert asked.order == wanted
    for each in wanted:
        asked.answer(each)
        found, expected = read(cache, each), read(data, each)
        assert torch.equal(tensor(found), tensor(expected)) and found.samples == expected.samples
        tensor(found).add_(1)  # it is the reader's own
    assert (cache.served, cache.missed) == (5, 0)
    assert cache.digest == "told" and torch.equal(cache.held_out(0)[0], data.held_out(0)[0])
    assert torch.equal(cache.micro_batch(1, 0)[1], data.micro_batch(1, 0)[1])


def test_both_sides_of_a_micro_batch_are_asked_for_at_once() -> None:
    data = Told(3)
    asked = Asked(data)
    cache = Prefetcher(data, asked)
    pairs = [[Wanted(side, 1, m) for side in (Side.INPUTS, Side.TARGETS)] for m in range(3)]
    cache.expect([*pairs[0], pairs[1][1], *pairs[2]])
    assert asked.calls == [pairs[0], [pairs[1][1]], pairs[2]], "who reads one side only asks for that"
    for call in asked.calls:
        asked.answer(call[0])
    for each in reversed(asked.order):
        found, expected = read(cache, each), read(data, each)
        assert torch.equal(tensor(found), tensor(expected)) and found.samples == expected.samples
    assert (cache.served, cache.missed) == (5, 0)


class Slow(Told):
    """Takes a while to read."""

    def inputs(self, step: int, micro_batch: int) -> Read:
        time.sleep(0.11)
        return super().inputs(step, micro_batch)


@pytest.mark.parametrize(("kind", "sizes"), [(Told, [1, 1, 1, 2, 4, 4, 4, 4, 3]), (Slow, [1, 1, 1, 1])])
def test_what_is_prepared_soon_is_asked_for_together(kind: type[Told], sizes: list[int]) -> None:
    data = kind(3)
    asked = Asked(data)
    cache = Prefetcher(data, asked, most=12, together=4)
    wanted = [Wanted(Side.INPUTS, 1, m) for m in range(24)]
    cache.expect(wanted[:1])  # nothing is known yet of how long it takes
    cache.expect(wanted[:2])
    asked.answer(wanted[0])
    cache.inputs(1, 0)
    cache.expect(wanted[1:4] if kind is Slow else wanted[1:])
    for each in wanted[1:] if kind is Told else wanted[1:4]:
        if not asked.futures[each].done():
            asked.answer(each)
        assert torch.equal(tensor(read(cache, each)), tensor(Told.inputs(data, 1, each.micro_batch)))
    assert [len(call) for call in asked.calls] == sizes
    assert asked.order == wanted[: len(asked.order)] and cache.missed == 0


def test_large_reads_are_asked_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Told(3)
    read_bytes = tensor(data.inputs(1, 0)).nbytes
    monkeypatch.setattr("actors.prefetch.MOST_AHEAD_BYTES", 6 * read_bytes)
    asked = Asked(data)
    cache = Prefetcher(data, asked, most=12, together=4)
    wanted = [Wanted(Side.INPUTS, 1, m) for m in range(24)]
    cache.expect(wanted[:1])  # nothing is known yet of how large it is
    asked.answer(wanted[0])
    cache.inputs(1, 0)
    cache.expect(wanted[1:])
    assert [len(call) for call in asked.calls] == [1, 1, 1, 2], "four more would be eight"
    for each in wanted[1:]:
        if not asked.futures[each].done():
            asked.answer(each)
        read(cache, each)
    assert asked.order == wanted and cache.missed == 0


def failing(future: Future[list[Prepared]]) -> None:
    future.set_exception(RuntimeError("lost with its process"))


def other_data(future: Future[list[Prepared]]) -> None:
    future.set_result([Prepared([], ("plain", 1), (), "another digest", 0.0)])


@pytest.mark.parametrize("what", [failing, other_data, lambda future: None, lambda future: future.cancel()])
def test_what_does_not_come_is_read_here(what: Callable[[Any], None]) -> None:
    data = Told(3)
    asked = Asked(data)
    cache = Prefetcher(data, asked, patience=0.01)
    cache.expect(STEP_ONE)
    what(asked.futures[STEP_ONE[1]])
    found = cache.inputs(1, 1)
    assert torch.equal(tensor(found), tensor(data.inputs(1, 1))) and found.samples == ((1, (1,)),)
    assert (cache.served, cache.missed) == (0, 1)


def test_a_call_that_is_late_is_waited_for_once() -> None:
    """Its other reads are asked for anew: whoever hangs is to cost one wait, not one a read."""
    data = Told(3)
    asked = Asked(data)
    cache = Prefetcher(data, asked, patience=0.01)
    pairs = [[Wanted(side, 1, m) for side in (Side.INPUTS, Side.TARGETS)] for m in range(2)]
    cache.expect([*pairs[0], *pairs[1]])
    late = asked.futures[pairs[0][0]]
    cache.inputs(1, 0)
    assert late.cancelled() and asked.calls == [*pairs, pairs[0][1:]]
    asked.futures[pairs[0][1]].set_result(prepare(data, pairs[0][1:]))
    found = cache.targets(1, 0)
    assert torch.equal(tensor(found), tensor(data.targets(1, 0))) and (cache.served, cache.missed) == (1, 1)
    assert not asked.futures[pairs[1][0]].done()


def test_what_was_never_announced_is_read_here() -> None:
    asked = Asked(Told(3))
    cache = Prefetcher(Told(3), asked)
    assert cache.inputs(9, 1).samples == ((9, (1,)),)
    assert (cache.served, cache.missed, asked.order) == (0, 1, [])


def test_no_more_is_asked_for_than_memory_is_meant_for() -> None:
    data = Told(3)
    asked = Asked(data)
    cache = Prefetcher(data, asked, most=2)
    cache.expect(STEP_ONE)
    assert asked.order == STEP_ONE[:2]
    asked.answer(STEP_ONE[0])
    cache.inputs(1, 0)
    assert asked.order == STEP_ONE[:3], "one was taken, one more is asked for"
    cache.inputs(1, 3)
    assert asked.order == STEP_ONE[:3], "what was read here needs nobody any more"


def test_a_change_of_plan_forgets_what_others_will_read() -> None:
    data = Told(3)
    asked = Asked(data)
    cache = Prefetcher(data, asked, most=3)
    cache.expect(STEP_ONE)
    kept = [STEP_ONE[2], Wanted(Side.INPUTS, 2, 0)]
    cache.expect(kept)
    assert asked.order == [*STEP_ONE[:3], kept[1]], "one stays, two are dropped, one is new"
    asked.answer(kept[0])
    asked.answer(kept[1])
    cache.inputs(1, 2)
    cache.inputs(2, 0)
    assert cache.served == 2


def test_with_nobody_there_everything_is_read_here_until_somebody_is() -> None:
    data = Told(3)
    asked = Asked(data)
    asked.answers = False
    cache = Prefetcher(data, asked)
    cache.expect(STEP_ONE)
    cache.inputs(1, 0)
    asked.answers = True
    cache.inputs(1, 1)
    assert asked.order == STEP_ONE[2:]
    asked.answer(STEP_ONE[2])
    cache.inputs(1, 2)
    assert (cache.served, cache.missed) == (1, 2)


def test_rota_takes_turns_and_leaves_out_who_failed() -> None:
    now = [0.0]
    rota = Rota(3, 1.0, clock=lambda: now[0])
    assert sorted(rota.next() for _ in range(3)) == [0, 1, 2]  # type: ignore[type-var]
    rota.failed(1)
    assert {rota.next() for _ in range(6)} == {0, 2}
    rota.failed(0)
    rota.failed(2)
    assert rota.next() is None
    now[0] = 1.0
    assert {rota.next() for _ in range(3)} == {0, 1, 2}


def test_rota_asks_those_who_fail_again_and_again_ever_later() -> None:
    now = [0.0]
    rota = Rota(1, 1.0, most_seconds=4.0, clock=lambda: now[0])
    for rest in (1.0, 2.0, 4.0, 4.0):
        rota.failed(0)
        now[0] += rest / 2
        rota.failed(0)  # what it had been asked before
        assert rota.next() is None
        now[0] += rest / 2
        assert rota.next() is None
        now[0] += rest / 2
        assert rota.next() == 0
    rota.answered(0)
    rota.failed(0)
    now[0] += 1.0
    assert rota.next() == 0


class Hung:
    """A feed worker that never answers, and how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.prepare = self

    def remote(self, wanted: Sequence[Wanted]) -> Any:
        self.asked += 1
        return SimpleNamespace(future=Future)


class Fast:
    """One that answers at once."""

    def __init__(self) -> None:
        self.prepare = self

    def remote(self, wanted: Sequence[Wanted]) -> Any:
        future: Future[list[Prepared]] = Future()
        future.set_result(prepare(Told(3), wanted))
        return SimpleNamespace(future=lambda: future)


def test_a_feed_worker_that_hangs_is_soon_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hung = Hung()
    workers: dict[str, Any] = {"run/feed-0": hung, "run/feed-1": Fast()}
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: workers[name])
    cache = Prefetcher(Told(3), Asker("run", 2), patience=0.01, most=4)
    wanted = [Wanted(Side.INPUTS, 1, m) for m in range(100)]
    cache.expect(wanted)
    for each in wanted:
        assert torch.equal(tensor(read(cache, each)), tensor(read(Told(3), each)))
    assert 0 < hung.asked <= 4, "what was asked for before it was known to hang"
    assert cache.missed == hung.asked and cache.served + cache.helped == 100 - hung.asked


def test_a_stage_is_told_of_what_it_reads_only() -> None:
    told: list[list[Wanted]] = []

    class Listening(Told):
        def expect(self, wanted: list[Wanted]) -> None:
            told.append(wanted)

    plan = Plan(1, (Stage(0, 2, (0, 1)), Stage(2, 4, (2, 3))), ((0, 1, 0, 1), (2, 3, 2, 3)), ())
    announce(Listening(1), plan, 0, 7)
    announce(Listening(1), plan, 2, 7, started=[(Side.TARGETS, 0)])
    sides = [{each.side for each in wanted} for wanted in told]
    assert sides == [{Side.INPUTS}, {Side.TARGETS}]
    assert [(w.step, w.micro_batch) for w in told[0]] == [
        (step, m) for step in range(7, 7 + READS_AHEAD // 2) for m in plan.micro_batches_of(0)
    ]
    assert (7, 0) not in [(w.step, w.micro_batch) for w in told[1]]
    announce(Tokens(1), plan, 0, 7)  # a data set that need not know is not told


def test_of_long_steps_the_next_one_is_told_too() -> None:
    told: list[Wanted] = []

    class Listening(Told):
        def expect(self, wanted: list[Wanted]) -> None:
            told.extend(wanted)

    plan = Plan(1, (Stage(0, 2, (0,)),), ((0,) * READS_AHEAD,), ())
    announce(Listening(1), plan, 0, 7)
    assert {each.step for each in told} == set(range(7, 7 + AHEAD))
    assert len(told) == AHEAD * READS_AHEAD * len(Side)


class Feeders:
    """Threads in the place of feed workers; ``broken`` ones fail from some read on."""

    def __init__(self, breaks_after: int) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._left = breaks_after
        self.data = Tokens(5)

    def __call__(self, wanted: Sequence[Wanted]) -> Future[list[Prepared]] | None:
        self._left -= 1
        return self._pool.submit(self._prepare, wanted, self._left)

    def _prepare(self, wanted: Sequence[Wanted], left: int) -> list[Prepared]:
        if left < 0:
            raise RuntimeError("broken")
        if left % 3 == 0:
            time.sleep(0.02)  # late now and then
        return prepare(self.data, wanted)


def prefetched(breaks_after: int, made: list[Prefetcher]) -> Prefetcher:
    made.append(Prefetcher(Tokens(5), Feeders(breaks_after), patience=0.01 if breaks_after % 2 else 1.0))
    return made[-1]


@pytest.mark.parametrize(("workers", "stages", "breaks_after"), [(3, 1, 1000), (4, 2, 20), (4, 3, 21)])
def test_runs_with_feeders_have_the_same_bits(
    tmp_path: Path, workers: int, stages: int, breaks_after: int
) -> None:
    made: list[Prefetcher] = []
    faults = (Fault(1, 3, "backward"),)
    job = toy_job(tmp_path, build_data=partial(prefetched, breaks_after, made), faults=faults)
    result = ChaosRun(job, tmp_path, workers, stages).run()
    assert result.outcome == "completed" and result.bits == toy_bits()
    assert sum(cache.served for cache in made) > 0
    assert breaks_after == 1000 or sum(cache.missed for cache in made) > 0
