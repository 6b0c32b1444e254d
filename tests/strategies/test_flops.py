"""FLOPs counted as layers run, against what is worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from strategies import flops
from strategies.devices import KNOWN, TERA, peak_of
from strategies.flops import FlopCounter
from strategies.model import ModelBuilder, build_model
from strategies.options import Precision
from strategies.profile import Profile
from strategies.warm_up import profile
from tests.support.models import Tokens, build


def counted(layer: Any, *inputs: torch.Tensor) -> int | None:
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with FlopCounter() as counter:
        out = layer(*leaves)
        wanted = [*leaves, *(layer.parameters() if isinstance(layer, nn.Module) else ())]
        torch.autograd.grad(out, wanted, torch.ones_like(out))
    return counter.flops


def test_a_linear_layer() -> None:
    # the product itself, and two more of its size for the gradients of input and weight
    assert counted(nn.Linear(8, 16), torch.randn(4, 8)) == 3 * (2 * 4 * 8 * 16)


def test_a_convolution() -> None:
    layer = nn.Conv2d(3, 5, kernel_size=3, padding=1)
    assert counted(layer, torch.randn(2, 3, 10, 10)) == 3 * (2 * 2 * 10 * 10 * 5 * 3 * 3 * 3)


def test_attention_on_a_cpu() -> None:
    """Scores and sums forward; backward computes the scores again, and two products for each of the two."""
    batch, heads, length, width = 2, 4, 16, 8
    query, key, value = (torch.randn(batch, heads, length, width) for _ in range(3))
    product = 2 * batch * heads * length * length * width
    assert counted(F.scaled_dot_product_attention, query, key, value) == 2 * product + 5 * product


def test_what_is_no_product_counts_nothing() -> None:
    assert counted(nn.LayerNorm(8), torch.randn(4, 8)) == 0


def test_the_compiler_is_not_imported_for_it() -> None:
    assert FlopCounter._should_skip_dynamo() is False


def test_a_formula_that_fails_costs_the_count_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> int:
        raise TypeError("of other arguments")

    monkeypatch.setitem(flops._FORMULAS, torch.ops.aten.addmm, broken)
    assert counted(nn.Linear(8, 16), torch.randn(4, 8)) is None


def test_a_kernel_without_a_formula_is_no_zero() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.LSTM(8, 8)

        def forward(self, x_TBD: torch.Tensor) -> torch.Tensor:
            return self.cells(x_TBD)[0]

    assert counted(Recurrent(), torch.randn(3, 2, 8)) is None


def test_a_kernel_of_another_library_is_no_zero() -> None:
    with torch.library._scoped_library("reknit_test", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
        with FlopCounter() as counter:
            torch.ops.reknit_test.double(torch.ones(2))
    assert counter.flops is None


def warmed_up(build: ModelBuilder, **precision: Any) -> Profile:
    return profile(
        build_model(build, 7),
        *Tokens(5).micro_batch(1, 0),
        seed=7,
        precision=Precision(**precision),
        device=torch.device("cpu"),
    )


class Shy(nn.Module):
    """Fails where somebody counts, as layers do that compile themselves when they are first called."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if is_in_torch_dispatch_mode():
            raise RuntimeError("not under a dispatch mode")
        return x_BTD


def test_a_layer_that_cannot_be_counted_is_trained_all_the_same() -> None:
    def with_shy() -> tuple[list[nn.Module], Any]:
        layers, loss = build()
        return [layers[0], Shy(), *layers[1:]], loss

    made = warmed_up(with_shy)
    assert made.flops is None
    assert len(made.forward) == 6


@pytest.mark.parametrize("recompute", [(), (1, 2)])
def test_a_model_is_counted_layer_by_layer(recompute: tuple[int, ...]) -> None:
    """Whatever is computed again is no further work of the model."""
    width, rows, vocabulary = 24, 2 * 5, 37
    made = warmed_up(build, recompute=recompute)
    mix = 3 * 2 * (2 * rows * width * 3 * width)
    assert made.flops == (0, mix, mix, mix, 3 * (2 * rows * width * vocabulary))


# Devices.


@pytest.mark.parametrize(
    ("name", "autocast", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", True, False, 989.4 * TERA),
        ("NVIDIA H100 80GB HBM3", False, False, 66.9 * TERA),
        ("NVIDIA H100 80GB HBM3", False, True, None),
        ("Tesla V100-SXM2-16GB", True, False, None),
        ("Tesla V100-SXM2-16GB", False, False, 15.7 * TERA),
        ("NVIDIA Future 9000", True, False, None),
    ],
)
def test_a_peak_is_known_or_not_there(name: str, autocast: bool, tf32: bool, peak: float | None) -> None:
    assert peak_of(name, autocast=autocast, tf32=tf32) == peak


def test_tensor_cores_are_faster_than_the_rest() -> None:
    for name, peaks in KNOWN.items():
        assert peaks.float32 is not None, name
        assert peaks.bf16 is None or 2 < peaks.bf16 / peaks.float32 < 40, name
