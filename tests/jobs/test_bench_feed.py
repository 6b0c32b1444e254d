"""The bench of the feed: both sides train on the same shapes, of the same samples; what is made of turns."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from jobs.assembly import build_data, data_arguments
from jobs.bench.feed import EXACT, FAST, PEER, Key, ratio, report, rounds_of, window
from jobs.bench.feed_peer import Trainer, prepared
from jobs.bench.feed_set import BATCH, MICRO_BATCHES, PREPARING, TRAINING, Regime, Window, recipe, write_set
from jobs.builders import build_layers
from jobs.data.multimodal import MultimodalData
from jobs.models.gpt import IGNORED

REGIMES = (PREPARING, TRAINING)


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_both_sides_have_the_same_work(tmp_path: Path, regime: Regime) -> None:
    small = replace(regime, files=2, rows=24, warm_up=0, steps=1)
    run = recipe(tmp_path, write_set(tmp_path, small), small, "fast")
    data = build_data(run.data.build, data_arguments(run))
    assert isinstance(data, MultimodalData) and data.samples == 48
    inputs, targets_BT = data.micro_batch(1, 0)
    assert (inputs["segment"] >= 0).all() and (targets_BT != IGNORED).all(), "rows are full: no padding"
    table = pq.read_table(tmp_path / "train-00000-of-00002.parquet").slice(0, BATCH)
    batch = {name: table[name].to_numpy(zero_copy_only=False) for name in ("image", "tokens")}
    theirs = prepared(batch, small.image)
    targets = theirs.pop("targets")[0]
    assert theirs.keys() == inputs.keys()
    for name, values in theirs.items():
        assert values[0].shape == tuple(inputs[name].shape) and str(values.dtype) in str(inputs[name].dtype)
        if name in ("segment", "position", "has_image"):
            assert (values[0] == inputs[name].numpy()).all()
    assert targets.shape == tuple(targets_BT.shape)
    assert (theirs["tokens"][0, :, 1:11] == targets[:, :10]).all(), "each token's target is the one after it"


def test_a_turn_of_the_peer_trains_for_its_steps(tmp_path: Path) -> None:
    small = replace(PREPARING, files=2, rows=24, warm_up=0, steps=1)
    run = recipe(tmp_path, write_set(tmp_path, small), small, "fast")
    data = build_data(run.data.build, data_arguments(run))
    taken = 0

    def batches():  # type: ignore[no-untyped-def]
        nonlocal taken
        while True:
            taken += 1
            inputs, targets = data.micro_batch(taken, 0)
            yield {name: value[None] for name, value in {**inputs, "targets": targets}.items()}

    trainer = Trainer(run)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    found = trainer.window(batches(), 2, 3)
    assert taken == 5 * MICRO_BATCHES
    assert found.samples_per_second > 0 and 0 < found.data_wait_share < 1
    changed = [not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True)]
    assert all(changed)


def test_the_model_that_costs_nothing_sees_every_sample_s_image_and_tokens(tmp_path: Path) -> None:
    small = replace(PREPARING, files=2, rows=24, warm_up=0, steps=1)
    run = recipe(tmp_path, write_set(tmp_path, small), small, "fast")
    (first, second), loss = build_layers(run.model.build, run.model.arguments)
    row, targets_BT = build_data(run.data.build, data_arguments(run)).micro_batch(1, 0)
    total, count = loss(second(first(row)), targets_BT)
    assert torch.isfinite(total) and int(count) == targets_BT.numel()
    before = first(row)
    changed = {**row, "image": row["image"].clone()}
    changed["image"][1, 3, -1, -1] ^= 255  # one pixel of one sample
    moved = (first(changed) != before).any(dim=-1)
    assert (moved == ((row["segment"] == 3) & (torch.arange(2) == 1)[:, None])).all()


def test_a_turn_is_its_last_steps() -> None:
    commits = [1.0, 2.0, 10.0, 10.5, 11.0, 11.5, 12.0]  # it stood still from 2 to 10
    waits = [(2, 0.5), (3, 8.0), (4, 8.1), (6, 8.25), (7, 8.3)]
    found = window([0.5, 0.5, 0.5], commits, waits)
    assert found.samples_per_second == MICRO_BATCHES * BATCH / 0.5
    assert found.data_wait_share == pytest.approx((8.3 - 8.1) / (12.0 - 10.5)), (
        "what it stood still is left out"
    )


def turns(*rates: float, wait: float = 0.0) -> list[Window]:
    return [Window(rate, wait) for rate in rates]


def test_ratios_are_of_turns_of_the_same_round() -> None:
    # a slow second round slows both; the ratio of the medians would be 1.2
    assert ratio(turns(120.0, 40.0, 110.0), turns(100.0, 50.0, 100.0)) == 1.1


def test_everybody_takes_a_turn_in_each_round_in_an_order_that_is_reversed() -> None:
    order: list[Key] = []

    def taker(key: Key, rate: float):  # type: ignore[no-untyped-def]
        def take() -> Window:
            order.append(key)
            return Window(rate * (order.count(key)), 0.0)

        return take

    keys = [(PREPARING, FAST), (PREPARING, PEER), (TRAINING, EXACT), (TRAINING, PEER)]
    console = Console(file=io.StringIO(), width=200)
    found = rounds_of({key: taker(key, float(n + 1)) for n, key in enumerate(keys)}, 3, console)
    assert order == [*keys, *reversed(keys), *keys]
    assert [turn.samples_per_second for turn in found[TRAINING, EXACT]] == [3.0, 6.0, 9.0]
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count("(0.500)") == 3 and printed.count("(0.750)") == 3, "each turn's ratio"


def test_the_headline_is_the_worse_regime_with_float_sums() -> None:
    def windows(preparing: float, training: float, exact: float, waits: tuple[float, float]):  # type: ignore[no-untyped-def]
        return {
            (PREPARING, FAST): turns(preparing, preparing, wait=0.9),
            (PREPARING, PEER): turns(1.0, 1.0, wait=0.9),
            (TRAINING, FAST): turns(training, training, wait=waits[0]),
            (TRAINING, EXACT): turns(exact, exact, wait=waits[1]),
            (TRAINING, PEER): turns(1.0, 1.0, wait=0.5),
        }

    found = report(windows(1.5, 1.1, 0.9, (0.01, 0.02)))
    assert found.headline["ratio_to_ray_train"] == 1.1 and found.headline["ratio_with_exact_sums"] == 0.9
    assert found.headline["data_wait_share"] == 0.02 and found.met
    found = report(windows(0.9, 1.1, 1.2, (0.01, 0.0)))
    assert found.headline["ratio_to_ray_train"] == 0.9 and not found.met
    assert not report(windows(1.5, 1.1, 1.1, (0.03, 0.0))).met, "who waits too long does not meet it"
    assert [row["of_ray_train"] for row in found.rows] == [0.9, 1.0, 1.1, 1.2, 1.0]
