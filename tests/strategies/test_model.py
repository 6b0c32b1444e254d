"""A user's model as layers: how its parameters are laid out, and what is refused with which sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.layout import ALIGNMENT
from strategies.model import Model, build_model, describe, flat_parameters
from strategies.options import Precision
from strategies.warm_up import profile
from tests.support.models import build, loss

CPU = torch.device("cpu")


def toy() -> Model:
    return build_model(build, seed=7)


def warm_up(layers: list[nn.Module], loss_function: Any = None, inputs: Any = None) -> Any:
    """What a worker does with a model before the run."""
    model = build_model(lambda: (layers, loss_function or mean_square), seed=1)
    inputs = torch.ones(2, 4) if inputs is None else inputs
    return profile(model, inputs, torch.ones(2, 4), seed=1, precision=Precision(), device=CPU)


def mean_square(output: Any, targets: Tensor) -> tuple[Tensor, int]:
    output = output[0] if isinstance(output, tuple) else output
    return ((output - targets) ** 2).sum(), 2


# --- the layout -----------------------------------------------------------------------------


def test_tensors_are_aligned_and_disjoint() -> None:
    layout = toy().layout
    for block in layout.blocks:
        assert block.size % ALIGNMENT == 0
        reached = 0
        for tensor in block.tensors:
            assert tensor.offset % ALIGNMENT == 0 and tensor.offset >= reached
            reached = tensor.stop
        assert reached <= block.size
    assert [tensor.index for tensor in layout.tensors] == list(range(len(layout.tensors)))
    layers, _ = build()
    unique = {id(p): p.numel() for layer in layers for p in layer.parameters()}
    assert layout.parameters == sum(unique.values())


def test_a_tied_parameter_is_a_block_of_its_own() -> None:
    layout = toy().layout
    shared = [block for block in layout.blocks if len(block.layers) > 1]
    assert [(block.layers, len(block.tensors)) for block in shared] == [((0, 4), 1)]
    uses = [(use.layer, use.name) for use in layout.uses if use.block == shared[0].index]
    assert uses == [(0, "table.weight"), (4, "weight")]


def test_matrices_decay_and_vectors_do_not() -> None:
    for tensor in toy().layout.tensors:
        assert tensor.decays is (len(tensor.shape) >= 2), tensor.name
    assert {tensor.decays for tensor in toy().layout.tensors} == {True, False}


def test_frozen_parameters_have_no_place() -> None:
    layer = nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    assert [tensor.name for tensor in describe([layer]).tensors] == ["0.weight"]


def test_a_parameter_used_twice_in_one_layer_has_two_names() -> None:
    first = nn.Linear(4, 4, bias=False)
    second = nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    layout = describe([nn.Sequential(first, second)])
    assert len(layout.tensors) == 1
    assert [use.name for use in layout.uses] == ["0.weight", "1.weight"]
    assert layout.blocks[0].layers == (0,)


def test_the_seed_decides_the_first_parameters() -> None:
    def flats(seed: int) -> list[Tensor]:
        model = build_model(build, seed)
        return [flat_parameters(model, block) for block in model.layout.blocks]

    assert all(a.equal(b) for a, b in zip(flats(7), flats(7), strict=True))
    assert not all(a.equal(b) for a, b in zip(flats(7), flats(8), strict=True))


def test_flat_parameters_are_the_model_s_with_zeros_between() -> None:
    model = toy()
    for block in model.layout.blocks:
        flat_N = flat_parameters(model, block)
        inside = torch.zeros(block.size, dtype=torch.bool)
        for use in model.layout.uses:
            if use.block == block.index:
                parameter = model.layers[use.layer].get_parameter(use.name)
                assert flat_N[use.tensor.offset : use.tensor.stop].equal(parameter.reshape(-1))
                inside[use.tensor.offset : use.tensor.stop] = True
        assert not flat_N[~inside].any()


# --- what is refused ------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its calls in a buffer, in place or by a new tensor."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self._in_place = in_place

    def forward(self, x_BD: Tensor) -> Tensor:
        if self._in_place:
            self.calls.add_(1)
        else:
            self.calls = self.calls + 1
        return self.linear(x_BD)


class Reading(nn.Module):
    """Only reads its buffer: harmless."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.linear(x_BD) * self.scale


class Returning(nn.Module):
    def __init__(self, value: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._value = value

    def forward(self, x_BD: Tensor) -> Any:
        return self._value(self.linear(x_BD))


def linear() -> list[nn.Module]:
    return [nn.Linear(4, 4)]


@pytest.mark.parametrize(
    ("build_bad", "message"),
    [
        (lambda: [], "must return \\(list of layers, loss function\\)"),
        (lambda: ([], loss), "non-empty list of nn.Module layers"),
        (lambda: ([torch.relu], loss), "non-empty list of nn.Module layers"),
        (lambda: (linear(), None), "callable loss as its second value"),
        (
            lambda: ([nn.Linear(4, 4), nn.BatchNorm1d(4)], loss),
            "layer 1 \\(BatchNorm1d\\).* running statistics",
        ),
        (
            lambda: ([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))], loss),
            "layer 0 \\(Sequential.1\\) is a BatchNorm1d.*use a layer norm",
        ),
        (
            lambda: ([nn.Linear(4, 4).double()], loss),
            "parameter weight of layer 0 is torch.float64.*autocast",
        ),
        (lambda: ([nn.Linear(4, 4).bfloat16()], loss), "parameter weight of layer 0 is torch.bfloat16"),
        (lambda: ([nn.ReLU()], loss), "no trainable parameters"),
    ],
)
def test_a_model_that_cannot_be_trained(build_bad: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(build_bad, seed=1)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_layer_that_changes_its_buffers(in_place: bool) -> None:
    with pytest.raises(
        ValueError, match=r"layer 1 \(Counting\) changes its buffer calls in forward.*stateless"
    ):
        warm_up([nn.Linear(4, 4), Counting(in_place)])


@pytest.mark.parametrize(
    "value",
    [lambda x: {1, 2}, lambda x: (x, object()), lambda x: x.detach().numpy()],
    ids=["set", "object", "array"],
)
def test_a_layer_that_returns_something_else(value: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match=r"a layer returned (set|object|ndarray); layers may pass tensors"):
        warm_up([Returning(value)])


@pytest.mark.parametrize(
    ("bad_loss", "message"),
    [
        (lambda output, targets: ((output - targets) ** 2).sum(), "must return \\(sum of the losses, number"),
        (lambda output, targets: (3.0, 2), "must return \\(sum of the losses, number"),
        (lambda output, targets: ((output - targets) ** 2, 2), "float32 scalar, not torch.float32 of shape"),
        (lambda output, targets: (output.double().sum(), 2), "float32 scalar, not torch.float64"),
    ],
)
def test_a_loss_that_is_none(bad_loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        warm_up(linear(), bad_loss)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.5)],
        [nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)],
        [Reading(), nn.ReLU()],
        [Returning(lambda x: (x, {"plain": 1, "none": None})), nn.Identity()],
    ],
    ids=["dropout", "batch norm without statistics", "buffer that is only read", "values"],
)
def test_what_is_harmless_is_taken(layers: list[nn.Module]) -> None:
    measured = warm_up(layers)
    assert len(measured.forward) == len(measured.backward) == len(measured.boundary_bytes) == len(layers)
    assert measured.boundary_bytes[0] == 2 * 4 * 4


def test_profiling_draws_the_numbers_that_training_would_not() -> None:
    """The warm-up leaves the parameters as they are."""
    model = build_model(build, seed=7)
    before = [flat_parameters(model, block) for block in model.layout.blocks]
    profile(
        model,
        torch.zeros(2, 5, dtype=torch.int64),
        torch.zeros(2, 5, dtype=torch.int64),
        seed=7,
        precision=Precision(),
        device=CPU,
    )
    after = [flat_parameters(model, block) for block in model.layout.blocks]
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))


def test_a_layer_that_changes_its_input_in_place() -> None:
    with pytest.raises(ValueError, match=r"layer 1 \(ReLU\) changes its input in place"):
        warm_up([nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)])


def test_a_first_layer_that_changes_what_the_data_gives() -> None:
    """No gradient is wanted there, so that torch itself says nothing."""
    with pytest.raises(ValueError, match=r"layer 0 \(ReLU\) changes its input in place"):
        warm_up([nn.ReLU(inplace=True), nn.Linear(4, 4)])
