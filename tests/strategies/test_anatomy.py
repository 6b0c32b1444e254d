"""What a layer keeps from forward to backward is counted storage by storage."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import nn

from strategies.anatomy import anatomy
from strategies.model import build_model
from strategies.options import Precision
from strategies.warm_up import profile
from tests.support.models import Tokens, build


def test_saved_tensors_and_outputs_count_once_and_nothing_else() -> None:
    layer = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x_BD = torch.randn(3, 8, requires_grad=True)
    found = anatomy(layer, [x_BD], lambda: [layer(x_BD)], perf_counter)
    # the output of tanh, kept for its own backward and for the second matrix, and the layer's output
    assert found.kept_bytes == 4 * 3 * (16 + 4)
    assert found.input_gradient > 0 and found.weight_gradient > 0


def test_a_layer_without_parameters_has_no_weight_gradient_to_speak_of() -> None:
    x_BD = torch.randn(3, 8, requires_grad=True)
    found = anatomy(nn.Tanh(), [x_BD], lambda: [x_BD.tanh()], perf_counter)
    assert found.kept_bytes == 4 * 3 * 8


def test_a_profile_in_detail_has_every_layer() -> None:
    model = build_model(build, 7)
    inputs, targets = Tokens(5).micro_batch(1, 0)
    arguments = {"seed": 7, "precision": Precision(), "device": torch.device("cpu")}
    plain = profile(model, inputs, targets, **arguments)
    found = profile(model, inputs, targets, **arguments, detailed=True)
    assert (plain.kept_bytes, plain.split_seconds) == ((), ())
    assert len(found.kept_bytes) == len(found.split_seconds) == len(model.layers)
    assert all(kept >= out for kept, out in zip(found.kept_bytes, found.boundary_bytes, strict=True))
    assert found.entry_bytes == inputs.nbytes
