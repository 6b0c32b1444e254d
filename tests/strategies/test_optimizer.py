from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.layout import ALIGNMENT, Block, TensorSpec, aligned
from strategies.optimizer import Update, segments, update
from strategies.options import OptimizerSettings

SETTINGS = OptimizerSettings(learning_rate=1e-2, warmup_steps=3, decay_steps=20, weight_decay=0.1)


def block_of(*shapes: tuple[int, ...]) -> Block:
    tensors, offset = [], 0
    for index, shape in enumerate(shapes):
        spec = TensorSpec(index, f"t{index}", shape, offset, len(shape) >= 2)
        tensors.append(spec)
        offset += aligned(spec.size)
    return Block(0, "block", (0,), tuple(tensors), offset)


def random_state(block: Block, seed: int) -> tuple[Tensor, list[Tensor]]:
    """A state with zero padding, and gradients for three steps."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.zeros(3, block.size)
    gradients = [torch.zeros(block.size) for _ in range(3)]
    for tensor in block.tensors:
        part = slice(tensor.offset, tensor.stop)
        state[0, part] = torch.randn(tensor.size, generator=generator)
        for gradient in gradients:
            gradient[part] = torch.randn(tensor.size, generator=generator) * 0.01
    return state, gradients


@settings(max_examples=40)
@given(data=st.data())
def test_slices_have_the_bits_of_whole_tensors_and_of_torch(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 700), min_size=1, max_size=4))
    shapes = [(n,) if data.draw(st.booleans()) else (1, n) for n in sizes]
    block = block_of(*shapes)
    state, gradients = random_state(block, data.draw(st.integers(0, 99)))
    units = block.size // ALIGNMENT
    cuts = sorted({0, units, *data.draw(st.lists(st.integers(0, units), max_size=4))})
    shards = [(a * ALIGNMENT, b * ALIGNMENT) for a, b in pairwise(cuts)]

    parameters = [
        torch.nn.Parameter(state[0, t.offset : t.stop].clone().reshape(t.shape)) for t in block.tensors
    ]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": SETTINGS.weight_decay if p.ndim >= 2 else 0.0} for p in parameters],
        betas=SETTINGS.betas,
        eps=SETTINGS.eps,
        fused=True,
    )
    # Each shard lies in memory of its own, at whatever address it gets.
    pieces = [state[:, a:b].clone() for a, b in shards]
    for step, gradient in enumerate(gradients, start=1):
        for parameter, tensor in zip(parameters, block.tensors, strict=True):
            parameter.grad = gradient[tensor.offset : tensor.stop].clone().reshape(tensor.shape)
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.rate(step)
        optimizer.step()
        before = [piece.clone() for piece in pieces]
        updates = [
            Update(piece, torch.full_like(piece, math.nan), gradient[a:b].clone(), segments(block, a, b))
            for piece, (a, b) in zip(pieces, shards, strict=True)
        ]
        update(updates, step, SETTINGS)
        assert all(torch.equal(old, kept) for old, kept in zip(pieces, before, strict=True))
        pieces = [each.new_state for each in updates]
        sharded = torch.cat(pieces, dim=1)
        for parameter, tensor in zip(parameters, block.tensors, strict=True):
            part = slice(tensor.offset, tensor.stop)
            kept = optimizer.state[parameter]
            for row, whole in enumerate((parameter, kept["exp_avg"], kept["exp_avg_sq"])):
                assert torch.equal(sharded[row, part], whole.detach().flatten())
    padding = torch.ones(block.size, dtype=torch.bool)
    for tensor in block.tensors:
        padding[tensor.offset : tensor.stop] = False
    assert not sharded[:, padding].any()


def test_large_tensors_have_the_bits_of_their_slices_too() -> None:
    """Beyond the size at which the kernel divides its work among threads."""
    block = block_of((100_003,), (1, 70_001))
    state, gradients = random_state(block, 7)
    whole = torch.empty_like(state)
    update([Update(state, whole, gradients[0], segments(block, 0, block.size))], 5, SETTINGS)
    assert not torch.equal(whole, state)
    cuts = [0, 64, 40_064, 100_032, 100_096, 150_016, block.size]
    for a, b in pairwise(cuts):
        new = torch.empty(3, b - a)
        update([Update(state[:, a:b], new, gradients[0][a:b], segments(block, a, b))], 5, SETTINGS)
        assert torch.equal(new, whole[:, a:b])


def test_segments_cover_each_tensor_once() -> None:
    block = block_of((10, 10), (3,), (300,))
    assert [(s.tensor.index, s.start, s.stop, s.decays) for s in segments(block, 0, block.size)] == [
        (0, 0, 100, True),
        (1, 128, 131, False),
        (2, 192, 492, False),
    ]
    assert [(s.tensor.index, s.start, s.stop) for s in segments(block, 64, 256)] == [
        (0, 0, 36),
        (1, 64, 67),
        (2, 128, 192),
    ]
    assert segments(block, 128, 128) == ()


def test_the_rate_warms_up_and_decays() -> None:
    s = OptimizerSettings(learning_rate=2.0, warmup_steps=4, decay_steps=14, minimum_rate=0.25)
    assert [s.rate(step) for step in (1, 2, 4)] == [0.5, 1.0, 2.0]
    assert s.rate(9) == pytest.approx(2.0 * 0.625)
    assert s.rate(14) == s.rate(1000) == pytest.approx(0.5)
    rates = [s.rate(step) for step in range(4, 15)]
    assert rates == sorted(rates, reverse=True)
    assert OptimizerSettings(learning_rate=2.0).rate(10**6) == 2.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"minimum_rate": 1.5},
        {"warmup_steps": -1},
        {"warmup_steps": 5, "decay_steps": 4},
        {"clip_norm": 0.0},
    ],
)
def test_senseless_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimizerSettings(**wrong)  # type: ignore[arg-type]
