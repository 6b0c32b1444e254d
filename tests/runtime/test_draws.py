"""Dropout's draws are torch's own, bit for bit, and leave the generator as torch leaves it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.draws import bernoulli_

PROGRAM = """
import hashlib
import sys

import torch
from torch.nn import functional as F

from runtime import draws

filled = []
bernoulli_ = draws.bernoulli_


def noted(target, *arguments, **others):
    filled.append(target.shape)
    return bernoulli_(target, *arguments, **others)


if sys.argv[1] == "ours":
    draws.bernoulli_ = noted
    if not draws.draw_in_vectors():
        sys.exit("other numbers")
    filled.clear()
torch.manual_seed(7)
x_BHTK = torch.randn(2, 4, 128, 16, requires_grad=True)
y_BHTK = F.scaled_dot_product_attention(x_BHTK, x_BHTK, x_BHTK, dropout_p=0.1, is_causal=True)
y_BHTK = F.dropout(F.dropout(y_BHTK.transpose(1, 2), 0.3), 0.2).transpose(1, 2) + F.dropout(x_BHTK[:1], 0.5)
F.dropout(x_BHTK.bfloat16(), 0.25).float().sum().backward(retain_graph=True)
y_BHTK.square().sum().backward()
assert len(filled) == (5 if sys.argv[1] == "ours" else 0), filled
parts = (y_BHTK, x_BHTK.grad, torch.get_rng_state(), torch.rand(3))
print(hashlib.sha256(b"".join(part.detach().numpy().tobytes() for part in parts)).hexdigest())
"""


def output(whose: str) -> str:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, whose]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode and "other numbers" in result.stderr:
        pytest.skip("torch draws by another generator on this processor (Intel's: MKL)")
    assert result.returncode == 0, result.stderr
    return result.stdout


def drawn_alike(target: Tensor, p: float, seed: int) -> bool:
    """``target`` is filled twice: by torch, and by us."""
    theirs, ours = (torch.Generator().manual_seed(seed) for _ in range(2))
    expected = target.bernoulli_(p, generator=theirs).clone()
    found = bernoulli_(target.zero_(), p, generator=ours)
    assert found is target
    return torch.equal(found, expected) and torch.equal(theirs.get_state(), ours.get_state())


@pytest.fixture(scope="module", autouse=True)
def torchs_own_are_known() -> None:
    """Nothing here replaces torch's kernel in this process: it is what is compared with."""
    output("ours")


SIZES = st.sampled_from((0, 1, 311, 16_383, 16_384, 16_385, 65_536, 65_537, 140_000))
DTYPES = st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool))
PROBABILITIES = st.floats(0.0, 1.0) | st.sampled_from((0.0, 0.1, 0.5, 0.9, 1 / 3, 1.0))


@given(SIZES, DTYPES, PROBABILITIES, st.integers(0, 1 << 62))
def test_bits_are_torchs_own(size: int, dtype: torch.dtype, p: float, seed: int) -> None:
    assert drawn_alike(torch.empty(size, dtype=dtype), p, seed)


@pytest.mark.parametrize("shape", ((20, 30, 40), (3, 7), (160, 128, 4)))
def test_order_is_that_of_memory(shape: tuple[int, ...]) -> None:
    assert drawn_alike(torch.empty(shape), 0.4, 1)
    assert drawn_alike(torch.empty(shape).transpose(0, 1), 0.4, 2)
    assert drawn_alike(torch.empty(shape)[:, ::2], 0.4, 3)


def test_a_parameter_can_be_filled() -> None:
    weight = torch.nn.Parameter(torch.empty(200, 200))
    with torch.no_grad():
        bernoulli_(weight, 0.25)
    assert weight.requires_grad and weight.mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("p", (-0.1, 1.5, float("nan")))
def test_a_probability_is_one(p: float) -> None:
    with pytest.raises(RuntimeError, match=r"p to be in \[0, 1\]"):
        bernoulli_(torch.empty(3), p)


def test_a_process_that_draws_so_has_the_same_forward_and_backward() -> None:
    assert output("ours") == output("theirs")
