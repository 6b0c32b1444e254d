"""Ladder residuals: which module reads what of the stream, and that a plain run trains them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jobs.models import gpt
from jobs.models.ladder import LadderBlock, LadderHead
from jobs.serving.decoder import decoder_of

SIZES = {"width": 16, "depth": 3, "heads": 2, "context": 8}


def built() -> list[nn.Module]:
    torch.manual_seed(3)
    return gpt.build(**SIZES, dropout=0.0, ladder=True)[0]


def test_every_module_reads_the_stream_without_the_output_before_it() -> None:
    layers = built()
    tokens_BT = torch.arange(14).view(2, 7)
    value = tokens_BT
    for layer in layers:
        value = layer(value)
    read_BTD = stream_BTD = layers[0](tokens_BT)  # what the next module reads, and what there is
    for block in layers[1:-1]:
        assert isinstance(block, LadderBlock)
        for module in (
            lambda x, block=block: block.attention(block.attention_norm(x)),
            lambda x, block=block: block.mlp_out(F.gelu(block.mlp_in(block.mlp_norm(x)))),
        ):
            read_BTD, stream_BTD = stream_BTD, stream_BTD + module(read_BTD)
    head = layers[-1]
    assert isinstance(head, LadderHead)
    torch.testing.assert_close(value, F.linear(head.norm(stream_BTD), head.weight), rtol=0, atol=1e-6)


def test_it_is_another_model_of_the_same_parameters() -> None:
    torch.manual_seed(3)
    plain = gpt.build(**SIZES, dropout=0.0)[0]
    for ours, theirs in zip(built(), plain, strict=True):
        for (name, parameter), (other, same) in zip(
            ours.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert name == other and torch.equal(parameter, same)


def test_it_is_not_served_as_the_plain_model() -> None:
    with pytest.raises(ValueError, match="cannot be served"):
        decoder_of(built(), torch.device("cpu"))
