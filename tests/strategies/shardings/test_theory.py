"""What a sharding sends and keeps is what theory says, to the byte."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from runtime.plan import Keeping
from strategies.options import Offload
from strategies.shardings.registry import SHARDINGS
from strategies.shardings.theory import moved_bytes, part_of, resident_bytes, sent_bytes
from tests.support.cluster import toy_job
from tests.support.counting import CountingRun
from tests.support.parts import even_part
from tests.support.values import build_values

LAYOUTS = [(1, 1), (3, 1), (4, 2)]
"""Workers, stages."""

CASES = [(name, None, *layout) for name in SHARDINGS for layout in LAYOUTS]
CASES += [("zero1", offload, 3, 1) for offload in (Offload(1, 1), Offload(2, 2))]
CASES += [(name, Offload(2, 1), 3, 1) for name, entry in SHARDINGS.items() if entry.keeps.parameters]
STEPS = 4


@pytest.mark.parametrize(("sharding", "offload", "workers", "stages"), CASES)
def test_bytes_are_counted_as_predicted(
    tmp_path: Path, sharding: str, offload: Offload | None, workers: int, stages: int
) -> None:
    job = toy_job(tmp_path, sharding=sharding, offload=offload, steps=STEPS)
    run = CountingRun(job, tmp_path, workers, stages)
    result = run.run()
    assert result.outcome == "completed", result.message
    plan, layout = run.controller.plan, run.members[0].layout
    assert plan is not None and plan.generation == 1 and len(plan.workers) == workers
    for worker in plan.workers:
        part = part_of(layout, plan, worker)
        assert run.bytes_of(worker, STEPS) == asdict(sent_bytes(sharding, part))
        expected = resident_bytes(sharding, part, offload)
        found = run.told[worker, STEPS].resident_bytes
        assert found["parameters"] == expected.parameters + expected.host_parameters
        assert found["accumulators"] == expected.sums
        assert found["shards"] == expected.shards + expected.backups


@pytest.mark.parametrize("offload", [Offload(1, 1), Offload(2, 1), Offload(2, 2), Offload(4, 2)])
def test_only_what_is_not_in_the_window_is_moved(tmp_path: Path, offload: Offload) -> None:
    """A lone worker, one stage: every micro-batch's forward and backward turn round in the window."""
    job = toy_job(tmp_path, build_model=build_values, offload=offload, steps=STEPS)
    run = CountingRun(job, tmp_path, 1, 1)
    assert run.run().outcome == "completed"
    plan, member = run.controller.plan, run.members[0]
    assert plan is not None
    part = part_of(member.layout, plan, 0)
    passes = job.micro_batches * (STEPS + 1)  # the first step probes the scales
    per_step = moved_bytes(part, offload, job.micro_batches)
    probing = moved_bytes(part, offload, passes) - moved_bytes(part, offload, passes - job.micro_batches)
    assert member.stage.window.moved_bytes == STEPS * per_step + probing  # type: ignore[union-attr]


def test_a_split_backward_fetches_a_third_time(tmp_path: Path) -> None:
    job = toy_job(tmp_path, sharding="zero3", schedule="zero-bubble", steps=STEPS)
    run = CountingRun(job, tmp_path, 4, 2)
    assert run.run().outcome == "completed"
    plan = run.controller.plan
    assert plan is not None and plan.generation == 1
    for worker in plan.workers:
        expected = sent_bytes("zero3", part_of(run.members[0].layout, plan, worker), split_backward=True)
        assert run.bytes_of(worker, STEPS) == asdict(expected)


def test_volumes_are_those_of_the_paper() -> None:
    """For one micro-batch a worker: 2, 2, 2 and 3 times the parameters; for many workers (g - 1) / g is 1."""
    part = even_part([1000.0] * 4, 4, 1.0)
    elements = {
        "ddp": (sent_bytes("ddp", part).reduce / 8, sent_bytes("ddp", part).gather / 4),
        "zero1": (sent_bytes("zero1", part).reduce / 8, sent_bytes("zero1", part).gather / 4),
        "zero2": (sent_bytes("zero2", part).reduce / 4, sent_bytes("zero2", part).gather / 4),
        "zero3": (sent_bytes("zero3", part).reduce / 4, sent_bytes("zero3", part).fetch / 4),
    }
    share = 4000.0 * 3 / 4
    assert elements == {
        "ddp": (share, share),
        "zero1": (share, share),
        "zero2": (share, share),
        "zero3": (share, 2 * share),
    }


def test_what_is_divided_shrinks_with_the_group() -> None:
    one, many = even_part([4096.0] * 8, 1, 8.0), even_part([4096.0] * 8, 8, 1.0)
    elements = 8 * 4096
    kept = {name: resident_bytes(name, many) for name in SHARDINGS}
    assert kept["ddp"].shards == 24 * elements and kept["ddp"].backups == 0
    assert kept["zero1"].shards == kept["zero1"].backups == 24 * elements / 8
    assert kept["zero1"].sums == 8 * elements and kept["zero2"].sums == 8 * elements / 8
    assert kept["zero2"].parameters == 4 * elements and kept["zero3"].parameters == 4 * elements / 4
    assert [kept[name].total for name in ("ddp", "zero1", "zero2", "zero3")] == sorted(
        (each.total for each in kept.values()), reverse=True
    )
    assert resident_bytes("zero1", one).total == resident_bytes("zero2", one).total


def test_offload_leaves_a_window_on_the_device() -> None:
    part = even_part([1000.0] * 10, 2, 4.0)
    for offload in (Offload(1, 1), Offload(3, 1), Offload(4, 2)):
        kept = resident_bytes("zero1", part, offload)
        assert kept.device == 4 * 1000 * (offload.window + offload.move)
        assert kept.host_parameters == 4 * 10_000
    assert resident_bytes("zero1", part, Offload(20, 10)).parameters == 4 * 10_000


@pytest.mark.parametrize(("window", "move"), [(0, 0), (1, 2), (3, 2), (2, 0)])
def test_a_window_that_cannot_be_moved_is_refused(window: int, move: int) -> None:
    with pytest.raises(ValueError, match="multiple of move"):
        Offload(window, move)


def test_every_sharding_says_what_it_keeps() -> None:
    assert {name: entry.keeping for name, entry in SHARDINGS.items()} == {
        "ddp": Keeping.STATE,
        "zero1": Keeping.PARAMETERS,
        "zero2": Keeping.PARAMETERS,
        "zero3": Keeping.NOTHING,
    }
