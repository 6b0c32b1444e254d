"""Layers computed slice by slice and head by head: the result is the whole layer's, whoever does it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import strategies.sequence.stage as stage_module
from jobs.models.captioner import EncoderBlock
from strategies.model import build_model
from strategies.sequence.phases import check_phases
from tests.support.models import build
from tests.support.sequences import (
    HEADS,
    TOKENS,
    WIDTH,
    build_gpt,
    build_ladder,
    elements_sent,
    in_a_team,
    long_tokens,
    make_stage,
)

SLICES = 5


@pytest.mark.parametrize("builder", [build_gpt, build_ladder])
def test_it_equals_full_attention(builder: Any) -> None:
    model = build_model(builder, seed=7)
    inputs, targets = long_tokens().micro_batch(1, 0)
    whole = inputs
    for layer in model.layers:
        whole = layer.eval()(whole)
    expected, count = model.loss(whole.detach(), targets)
    stage = make_stage(SLICES, builder)
    value, _ = stage.forward(1, 0, stage.split(inputs), train=False, check=lambda: None)
    logits = torch.cat([tensors[0] for tensors in value.values()], dim=1)
    assert (logits - whole).abs().max() < 1e-5
    loss, tokens, _ = stage.loss_of(value, targets, train=False)
    assert abs(loss - float(expected)) < 1e-4 and tokens == int(count)


def test_gradients_equal_those_of_full_attention() -> None:
    model = build_model(build_gpt_without_dropout, seed=7)
    inputs, targets = long_tokens().micro_batch(3, 1)
    value = inputs
    for layer in model.layers:
        value = layer(value)
    model.loss(value, targets)[0].backward()
    stage = make_stage(SLICES, build_gpt_without_dropout)
    value, kept = stage.forward(3, 1, stage.split(inputs), train=True, check=lambda: None)
    _, _, gradients = stage.loss_of(value, targets, train=True)
    exponents = [30] * len(stage.layout.tensors)
    stage.backward(3, 1, kept, gradients, exponents, check=lambda: None)
    for use in model.layout.uses:
        if use.block == 0 or len(model.layout.blocks[use.block].layers) > 1:
            continue  # a tied one has two gradients here, and one there
        expected = model.layers[use.layer].get_parameter(use.name).grad
        assert expected is not None
        summed = stage.summed()[use.block][use.tensor.offset : use.tensor.stop] * 2.0**-30
        assert (summed - expected.flatten()).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


def build_gpt_without_dropout() -> tuple[list[nn.Module], object]:
    return build_gpt(dropout=0.0)


@pytest.mark.parametrize("team", [2, 3, 4, 5])
@pytest.mark.parametrize("way", ["plain", "recompute", "deferred", "autocast", "ladder"])
def test_the_bits_do_not_depend_on_the_team(team: int, way: str) -> None:
    build = build_ladder if way == "ladder" else build_gpt
    recompute = (1, 2) if way == "recompute" else ()
    alone = in_a_team(1, SLICES, build=build, autocast=way == "autocast")
    several = in_a_team(
        team, SLICES, deferred=way == "deferred", build=build, autocast=way == "autocast", recompute=recompute
    )
    assert several.losses == alone.losses
    for block, sums in alone.sums.items():
        assert torch.equal(several.sums[block], sums) and sums.abs().max() > 0


@pytest.mark.parametrize("team", [1, 2, 3, 5])
def test_bytes_are_those_of_the_formula(team: int) -> None:
    """What the fabric has sent: by layer and sample the formula's, backward the same with the two ways
    exchanged, and nothing else."""
    blocks, samples, head = 2, 2, WIDTH // HEADS
    forward = elements_sent(TOKENS, SLICES, HEADS, team, (3 * head, head))
    backward = elements_sent(TOKENS, SLICES, HEADS, team, (head, 3 * head))
    total = [blocks * samples * (there + back) for there, back in zip(forward, backward, strict=True)]
    assert in_a_team(team, SLICES).bytes_sent == [4 * elements for elements in total]


@pytest.mark.parametrize("team", [1, 2, 3])
@pytest.mark.parametrize("deferred", [False, True])
def test_equally_fast_members_report_equal_seconds(
    monkeypatch: pytest.MonkeyPatch, team: int, deferred: bool
) -> None:
    """Whatever their shares are: the planner takes nobody for slow who has two heads of the three."""
    clocks = threading.local()

    def a_second_later() -> float:
        clocks.now = getattr(clocks, "now", 0.0) + 1.0
        return float(clocks.now)

    monkeypatch.setattr(stage_module.time, "perf_counter", a_second_later)
    parts = {0: SLICES, 1: 2 * SLICES + HEADS, 2: 2 * SLICES + HEADS, 3: SLICES}
    put_off = {0: SLICES, 1: 2 * SLICES, 2: 2 * SLICES, 3: SLICES} if deferred else dict.fromkeys(parts, 0)
    for times in in_a_team(team, SLICES, deferred=deferred).times:
        assert times.forward == pytest.approx(parts)
        assert times.backward == pytest.approx({layer: parts[layer] + put_off[layer] for layer in parts})
        assert times.micro_batches == dict.fromkeys(parts, 1)


def test_a_layer_that_cannot_be_divided_is_named() -> None:
    layers, _ = build()
    with pytest.raises(ValueError, match=r"layer 0 \(Embed\) .* parallel\.sequence = 1"):
        check_phases(layers)


def test_who_overrides_forward_must_describe_its_own_phases() -> None:
    """The captioner's blocks are blocks of the language model with another attention."""
    block = EncoderBlock(8, 2, 4, 0.0, 2)
    with pytest.raises(ValueError, match="EncoderBlock"):
        check_phases([block])
