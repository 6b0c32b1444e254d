"""The parts of the benches that compute figures from measurements, and the models that they measure."""

from __future__ import annotations

import math
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from jobs.bench import activations, degraded, overhead
from jobs.bench.activations import Meter
from jobs.bench.degraded import Degraded, settled, stages_of, victim
from jobs.bench.emulated import build, build_data
from jobs.bench.footprint import parts, theory
from jobs.bench.pipelining_peer import PeerLayout, flat_gradients
from jobs.bench.report import BenchReport
from jobs.bench.resident import Mark, Turn, Turns, core_seconds_per_step, standard_error, whole_steps
from jobs.bench.simulated import Simulated
from jobs.models.gpt import build as build_gpt
from runtime.events import StepRecord
from runtime.layout import Layout
from runtime.plan import Member, Plan, Stage
from strategies.model import build_model
from strategies.sharding import shard_blocks


def test_whole_steps_lie_inside_the_turn() -> None:
    commits = [1.0, 2.0, 3.5, 5.5, 9.0]
    assert whole_steps(commits, 1.5, 6.0) == [1.5, 2.0]
    assert whole_steps(commits, 2.1, 3.4) == []


def test_ratio_compares_turns_of_the_same_round() -> None:
    # a slow second round slows both: the ratio of each round is 2, that of the overall medians is not
    own = [Turn([1.0, 1.0, 9.0], Mark(3, 10.0), Mark(6, 16.0)), Turn([10.0], Mark(8, 20.0), Mark(9, 22.0))]
    peer = [Turn([2.0], Mark(1, 0.0), Mark(2, 1.0)), Turn([20.0] * 3, Mark(3, 2.0), Mark(6, 5.0))]
    assert overhead.ratio(own, peer) == 2.0
    assert standard_error(own, peer) == 0.0 and standard_error(own[:1], peer[:1]) == 0.0
    uneven = [peer[0], replace(peer[1], seconds=[40.0])]  # ratios 2 and 4
    assert standard_error(own, uneven) == pytest.approx(math.sqrt(math.pi / 2))
    assert core_seconds_per_step(own) == 2.0


def test_turns_count_whole_steps_and_leave_everybody_running() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        commits: list[float] = []

        def poll() -> list[float]:
            commits.append(time.time())
            return commits

        with Turns({"sleeper": [sleeper.pid]}) as turns:
            turn = turns.take("sleeper", poll, 3)
        assert len(turn.seconds) >= 3
        assert all(seconds > 0 for seconds in turn.seconds)
        assert turn.last.commits - turn.first.commits >= 3
        assert turn.last.core_seconds - turn.first.core_seconds < 1.0
        assert Path(f"/proc/{sleeper.pid}/stat").read_text().split()[2] != "T"
        sleeper.kill()


def test_recipes_are_valid_and_differ_in_the_reduction_only() -> None:
    exact, fast = overhead.recipe("exact"), overhead.recipe("fast")
    assert exact.model_copy(update={"reduction": "fast"}) == fast
    for workers in degraded.FORWARD_SECONDS:
        assert degraded.recipe(workers).parallel.workers == workers


def test_peer_layout_divides_micro_batches_and_ranks() -> None:
    layout = PeerLayout((0, 4, 8), 2)
    assert [layout.place(rank) for rank in range(layout.processes)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [layout.replica(r) for r in range(2)] == [[0, 2], [1, 3]]
    assert [layout.group(k) for k in range(2)] == [[0, 1], [2, 3]]
    dealt = [*layout.micro_batches(0, 6), *layout.micro_batches(1, 6)]
    assert sorted(dealt) == list(range(6))
    with pytest.raises(ValueError, match="do not divide"):
        layout.micro_batches(0, 5)


def test_flat_gradients_collect_what_backward_adds() -> None:
    layer = nn.Linear(3, 2)
    flat_N = flat_gradients(list(layer.parameters()))
    for _ in range(2):
        layer(torch.ones(1, 3)).sum().backward()
    assert flat_N.tolist() == [2.0] * 8
    assert layer.weight.grad is not None
    assert layer.weight.grad.untyped_storage().data_ptr() == flat_N.untyped_storage().data_ptr()


def _gpt_plan(groups: tuple[tuple[int, ...], ...]) -> tuple[Plan, Layout]:
    model = build_model(partial(build_gpt, width=16, depth=2, heads=2, context=8, tied=False), 1)
    cut = (0, 2, 4) if len(groups) == 2 else (0, 4)
    stages = tuple(Stage(cut[k], cut[k + 1], group) for k, group in enumerate(groups))
    members = [Member(worker, "node") for group in groups for worker in group]
    assignment = tuple(tuple(group[m % len(group)] for m in range(8)) for group in groups)
    shards = shard_blocks(model.layout, stages, members)
    return Plan(1, stages, assignment, shards), model.layout


def test_theory_adds_up_over_the_workers() -> None:
    plan, layout = _gpt_plan(((0, 1), (2, 3)))
    each = [theory(plan, layout, worker, 1000) for worker in plan.workers]
    assert sum(part["parameters"] for part in each) == 2 * 4 * layout.parameters
    assert sum(part["accumulators"] for part in each) == 2 * 8 * layout.parameters
    assert sum(part["shards"] for part in each) == 2 * 2 * 12 * layout.parameters
    # 1F1B: the first of two stages keeps two micro-batches, the last one
    assert [part["activations"] for part in each] == [2000, 2000, 1000, 1000]


def test_theory_of_a_lone_worker_has_no_copies_of_others() -> None:
    plan, layout = _gpt_plan(((0,),))
    assert theory(plan, layout, 0, 0)["shards"] == 2 * 12 * layout.parameters


def test_parts_total_leaves_out_what_has_no_theory() -> None:
    expected = {"parameters": 10, "activations": 5}
    rows = parts(3, 1, {"parameters": 11, "activations": 5, "inbox_peak": 100}, expected)
    total = next(row for row in rows if row.is_total)
    assert (total.measured, total.theory) == (16, 15)
    assert rows[-1].theory is None


def test_meter_counts_a_storage_once_and_forgets_it_with_its_graph() -> None:
    meter = Meter()
    (layer,) = activations.meter([nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh())], meter)
    x_BD = torch.ones(2, 4, requires_grad=True)
    y_BD = layer(x_BD)
    # the input (saved by the linear layer) and tanh's output (also the layer's): 8 floats each
    assert meter.bytes == 2 * 8 * 4
    second = layer(x_BD)
    assert meter.bytes == 3 * 8 * 4  # the input is shared
    second.sum().backward()
    del second
    assert meter.bytes == 2 * 8 * 4
    del x_BD, y_BD
    assert (meter.bytes, meter.peak) == (0, 3 * 8 * 4)


def test_meter_does_not_change_results() -> None:
    torch.manual_seed(1)
    plain = nn.Linear(4, 4)
    (metered,) = activations.meter([plain], Meter())
    x_BD = torch.randn(2, 4)
    assert torch.equal(
        torch.autograd.grad(plain(x_BD).square().sum(), plain.weight)[0],
        torch.autograd.grad(metered(x_BD).square().sum(), plain.weight)[0],
    )


def test_sleeping_layers_pass_gradients() -> None:
    layers, loss = build(layers=2, forward_seconds=0.0)
    inputs_BD, targets_BD = build_data(micro_batch_size=3, micro_batches=1, seed=1).micro_batch(1, 0)
    output = inputs_BD
    for layer in layers:
        output = layer(output)
    total, count = loss(output, targets_BD)
    total.backward()
    assert count == 3
    expected = (inputs_BD * (inputs_BD - targets_BD) * 2).sum(0)
    for layer in layers:
        gradient = layer.get_parameter("scale").grad
        assert gradient is not None
        torch.testing.assert_close(gradient, expected)
    with pytest.raises(ValueError, match="at least 1"):
        build(layers=0, forward_seconds=0.0)


def test_equal_layers_sleep_equally_long_also_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("jobs.bench.emulated.time.sleep", slept.append)
    layers, _ = build(layers=2, forward_seconds=1.0)
    for layer, wants_gradient in zip(layers, (False, True), strict=True):
        slept.clear()
        layer(torch.ones(1, 64).requires_grad_(wants_gradient)).sum().backward()
        assert sum(slept) == 1.0 + 2.0


def _record(step: int, workers: int, seconds: float) -> StepRecord:
    return StepRecord(
        step=step,
        loss=1.0,
        grad_norm=1.0,
        learning_rate=1e-3,
        samples=1,
        tokens=1,
        seconds=seconds,
        workers=workers,
        generation=1,
        fingerprint=0,
        attempts=1,
        committed_at=float(step),
    )


def test_settled_steps_leave_out_the_first_of_a_membership() -> None:
    steps = [
        _record(1, 8, 9.0),
        _record(2, 8, 1.0),
        _record(3, 8, 1.5),
        _record(4, 7, 5.0),
        _record(5, 7, 2.0),
    ]
    assert settled(steps, 8) == [1.0, 1.5]
    assert settled(steps, 7) == [2.0]


def test_share_of_ideal() -> None:
    undisturbed, one, two = (
        Degraded(8, lost, seconds, seconds, "", 2**-7) for lost, seconds in ((0, 3.0), (1, 3.5), (2, 5.0))
    )
    assert Degraded(8, 2, 4.0, 4.0, "", 2**-7).share_of_ideal(undisturbed) == 1.0
    assert two.busy_share() == degraded.LAYERS * degraded.MICRO_BATCHES * 2**-7 / (5.0 * 6)
    report = degraded.report([[undisturbed, one, two]])
    assert report.headline["worst_share_of_ideal"] == pytest.approx(0.8)
    assert not report.met
    assert [row["simulated"] for row in report.rows[1:]] == degraded.simulated_shares(8, degraded.STAGES)[:2]


def test_the_goal_is_not_met_on_a_machine_that_is_not_quiet() -> None:
    def report_of(undisturbed: float) -> BenchReport:
        series = [Degraded(8, lost, undisturbed * 8 / (8 - lost), 1.0, "", 0.1) for lost in range(4)]
        return degraded.report([series])

    quiet, unquiet = report_of(4.3), report_of(7.0)
    assert quiet.headline == unquiet.headline == {"worst_share_of_ideal": pytest.approx(1.0)}
    assert quiet.met and not any("quiet" in note for note in quiet.notes)
    assert not unquiet.met and any("8 workers: undisturbed steps took 1." in n for n in unquiet.notes)


def test_a_simulated_slow_worker_costs_an_even_split_nearly_half() -> None:
    undisturbed, even, anew = Simulated(8, 4, 32, 64, 0.005).slowed(0.5)
    assert undisturbed < anew < 1.15 * undisturbed < 1.7 * undisturbed < even


@pytest.mark.parametrize("workers", degraded.FORWARD_SECONDS)
def test_the_plans_alone_are_good_enough_for_the_goal(workers: int) -> None:
    assert min(degraded.simulated_shares(workers, degraded.STAGES)) >= degraded.GOAL


def test_victim_is_of_the_largest_group() -> None:
    plan = Plan(1, (Stage(0, 2, (0, 1)), Stage(2, 4, (2, 3, 4))), ((0, 1), (2, 3)), ())
    assert victim(plan) == 4
    assert stages_of(plan) == "2x2 2x3"
