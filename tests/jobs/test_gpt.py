"""The GPT: what its layers promise to whoever cuts, recomputes and ties them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.models.gpt import IGNORED, Block, Rotary, build, loss

SIZES: dict[str, Any] = {"width": 32, "depth": 3, "heads": 4, "context": 16}


def built(**changes: Any) -> list[nn.Module]:
    torch.manual_seed(7)
    return build(**{**SIZES, **changes})[0]


def forward(layers: list[nn.Module], tokens_BT: Tensor) -> Tensor:
    x: Tensor = tokens_BT
    for layer in layers:
        x = layer(x)
    return x


def weight(layer: nn.Module) -> nn.Parameter:
    assert isinstance(layer.weight, nn.Parameter)
    return layer.weight


def test_layers_and_shapes() -> None:
    layers = built(vocabulary=50)
    assert len(layers) == SIZES["depth"] + 2
    assert all(isinstance(layer, Block) for layer in layers[1:-1])
    x_BTD = layers[0](torch.zeros(2, 9, dtype=torch.int64))
    assert x_BTD.shape == (2, 9, 32)
    assert layers[1](x_BTD).shape == (2, 9, 32)
    assert layers[-1](x_BTD).shape == (2, 9, 50)
    assert {parameter.dtype for layer in layers for parameter in layer.parameters()} == {torch.float32}


def test_seed_decides_the_parameters() -> None:
    first, second = nn.Sequential(*built()), nn.Sequential(*built())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_tied_head_shares_the_embedding_itself() -> None:
    layers = built()
    assert weight(layers[-1]) is weight(layers[0])
    untied = built(tied=False)
    assert weight(untied[-1]) is not weight(untied[0])
    vocabulary_parameters = 256 * SIZES["width"]
    assert sum(p.numel() for p in nn.Sequential(*untied).parameters()) == (
        sum(p.numel() for p in nn.Sequential(*layers).parameters()) + vocabulary_parameters
    )


def test_tied_weight_gets_gradients_of_both_uses() -> None:
    tied, untied = built(dropout=0.0), built(dropout=0.0, tied=False)
    weight(untied[-1]).data.copy_(weight(untied[0]).data)
    for a, b in zip(tied[1:], untied[1:], strict=True):
        b.load_state_dict(a.state_dict())
    tokens_BT = torch.arange(32).view(2, 16)

    def gradients(layers: list[nn.Module], of: list[nn.Parameter]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(forward(layers, tokens_BT), tokens_BT.flip(1))[0], of)

    (both,) = gradients(tied, [weight(tied[0])])
    embedding, head = gradients(untied, [weight(untied[0]), weight(untied[-1])])
    torch.testing.assert_close(both, embedding + head)
    assert embedding.any()
    assert head.any()


def test_attention_is_causal() -> None:
    layers = [layer.eval() for layer in built()]
    tokens_BT = torch.randint(0, 256, (2, 16))
    changed_BT = tokens_BT.clone()
    changed_BT[:, 10:] = (changed_BT[:, 10:] + 1) % 256
    before_BTV, after_BTV = forward(layers, tokens_BT), forward(layers, changed_BT)
    assert torch.equal(before_BTV[:, :10], after_BTV[:, :10])
    assert not torch.isclose(before_BTV[:, 10:], after_BTV[:, 10:]).all(dim=-1).any()


def test_rotary_products_depend_on_distance_only() -> None:
    rotary = Rotary(head_width=8, context=32)
    q_K, k_K = torch.randn(8), torch.randn(8)
    q_TK, k_TK = rotary(q_K.expand(1, 1, 32, 8))[0, 0], rotary(k_K.expand(1, 1, 32, 8))[0, 0]
    products_TT = q_TK @ k_TK.T
    for distance in (0, 1, 5, 31):
        diagonal = products_TT.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(q_TK.norm(dim=-1), q_K.norm().expand(32))
    assert not torch.isclose(products_TT[0, 0], products_TT[5, 0])


def test_no_state_beside_parameters_changes() -> None:
    layers = built()
    buffers = {name: b.clone() for name, b in nn.Sequential(*layers).named_buffers()}
    assert buffers
    assert not nn.Sequential(*layers).state_dict().keys() & buffers.keys()
    tokens_BT = torch.zeros(1, 16, dtype=torch.int64)
    torch.autograd.backward(loss(forward(layers, tokens_BT), tokens_BT)[0])
    for name, buffer in nn.Sequential(*layers).named_buffers():
        assert torch.equal(buffer, buffers[name])


@pytest.mark.parametrize("layer", range(SIZES["depth"] + 1))
def test_dropout_repeats_with_the_seed(layer: int) -> None:
    module = built(dropout=0.5)[layer]
    x = torch.randint(0, 256, (2, 16)) if layer == 0 else torch.randn(2, 16, 32)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(module(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    module.eval()
    assert torch.equal(module(x), module(x))


def test_attention_weights_are_dropped_too() -> None:
    torch.manual_seed(0)
    block = built(dropout=0.5)[1]
    assert isinstance(block, Block)
    block.dropout.p = 0.0
    x_BTD = torch.randn(1, 16, 32)
    assert not torch.equal(block(x_BTD), block(x_BTD))


def test_loss_is_the_sum_over_valid_tokens() -> None:
    logits_BTV, targets_BT = torch.randn(3, 5, 11), torch.randint(0, 11, (3, 5))
    total, count = loss(logits_BTV, targets_BT)
    assert (count.item(), total.dtype, total.ndim) == (15, torch.float32, 0)
    mean = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    torch.testing.assert_close(total, mean * 15)
    targets_BT[0] = IGNORED
    fewer, count = loss(logits_BTV, targets_BT)
    assert count.item() == 10
    torch.testing.assert_close(fewer, loss(logits_BTV[1:], targets_BT[1:])[0])


def test_loss_is_float32_under_autocast() -> None:
    layers = built()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BTV = forward(layers, torch.zeros(1, 16, dtype=torch.int64))
        total, _ = loss(logits_BTV, torch.zeros(1, 16, dtype=torch.int64))
    assert logits_BTV.dtype == torch.bfloat16
    assert total.dtype == torch.float32


def test_first_loss_is_that_of_a_guess() -> None:
    layers = [layer.eval() for layer in built()]
    tokens_BT = torch.randint(0, 256, (8, 16))
    total, count = loss(forward(layers, tokens_BT), torch.randint(0, 256, (8, 16)))
    assert total.item() / count.item() == pytest.approx(5.545, abs=0.05)  # ln 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 36}, r"width \(36\) is not a multiple of 2 x heads \(8\)"),
        ({"depth": 0}, "depth is 0: it must be at least 1"),
        ({"context": -1}, "context is -1"),
        ({"vocabulary": 0}, "vocabulary is 0"),
        ({"dropout": 1.0}, "dropout is 1.0: it must be at least 0 and below 1"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(**changes)


def test_sample_longer_than_the_context() -> None:
    with pytest.raises(ValueError, match="a sample has 17 tokens but the model's context is 16"):
        built()[0](torch.zeros(1, 17, dtype=torch.int64))
