"""Gradients from given gradients of outputs."""

from __future__ import annotations

import subprocess
import sys

import torch

from strategies.differentiation import differentiate


def test_the_same_bits_as_autograd_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BD, w_DD, unused = (
        torch.randn(shape, generator=generator).requires_grad_() for shape in ((3, 5), (5, 5), (2,))
    )
    outputs = [torch.tanh(x_BD @ w_DD), (x_BD * w_DD[0]).sum(1)]
    gradients = [torch.randn(output.shape, generator=generator) for output in outputs]
    first = differentiate(outputs, gradients, [x_BD], keep_graph=True)
    second = differentiate(outputs, gradients, [x_BD, w_DD, unused], keep_graph=True)
    x_gradient, w_gradient, none = torch.autograd.grad(
        outputs, [x_BD, w_DD, unused], gradients, allow_unused=True
    )
    assert none is None and second[2] is None
    assert second[0] is not None and torch.equal(second[0], x_gradient)
    assert second[1] is not None and torch.equal(second[1], w_gradient)
    assert first[0] is not None and torch.equal(first[0], x_gradient)


WARM_UP = """
import sys, torch
from tests.support.models import build, Tokens
from strategies.model import build_model
from strategies.options import Precision
from strategies.warm_up import profile
model = build_model(build, 0)
inputs, targets = Tokens(0).micro_batch(1, 0)
profile(model, inputs, targets, seed=0, precision=Precision(), device=torch.device("cpu"))
print("sympy" in sys.modules)
"""


def test_a_warm_up_does_without_symbolic_algebra() -> None:
    found = subprocess.run([sys.executable, "-c", WARM_UP], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]
