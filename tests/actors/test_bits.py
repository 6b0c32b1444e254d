"""The result does not depend on who computed it: every layout gives the bits of one plain process."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from runtime.events import StepRepeated
from strategies.options import OptimizerSettings, Precision
from tests.support.cluster import OPTIMIZER, LocalRun, Result, run_toy, toy_job
from tests.support.expected import Bits, reference_bits, reference_steps, toy_bits
from tests.support.models import Head, Tokens, build
from tests.support.values import Jumping, build_values, scaled_loss

Stages = int | Literal["auto"]

LAYOUTS: list[tuple[int, Stages]] = [
    (1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 3), (6, 1), (6, 2), (6, 3),
    (4, "auto"), (6, "auto"),
]  # fmt: skip
FEW_LAYOUTS: list[tuple[int, Stages]] = [(1, 1), (3, 2), (4, 3)]


def assert_bits(result: Result, expected: Bits) -> None:
    assert result.outcome == "completed", result.message
    assert [record.step for record in result.steps] == list(range(1, len(expected) + 1))
    assert result.bits == expected


@pytest.mark.parametrize(("workers", "stages"), LAYOUTS)
def test_any_number_of_workers_and_stages(tmp_path: Path, workers: int, stages: Stages) -> None:
    assert_bits(run_toy(tmp_path, workers, stages), toy_bits())


def test_what_the_bits_depend_on() -> None:
    """The test above can fail: dropout, the tie, clipping, seed and order of steps all show in the bits."""
    usual = toy_bits()
    assert len(set(usual)) == len(usual)
    assert all(step.grad_norm > 0.5 for step in reference_steps()), "clipping to 0.5 is active in every step"
    variants = [
        reference_bits(seed=8),
        reference_bits(build_model=partial(build, dropout=0.0)),
        reference_bits(build_model=untied),
        reference_bits(autocast=True),
        reference_bits(optimizer=OptimizerSettings(learning_rate=3e-2, warmup_steps=2, decay_steps=8)),
        reference_bits(micro_batches=4),
    ]
    for number, variant in enumerate(variants):
        assert variant[-1][2] != usual[-1][2], f"variant {number} has the same parameters"


def untied() -> Any:
    """The toy model with a head of its own."""
    layers, loss = build()
    head = layers[-1]
    assert isinstance(head, Head)
    head.weight = nn.Parameter(head.weight.detach().clone())
    return layers, loss


@pytest.mark.parametrize(
    ("autocast", "recompute", "workers", "stages"),
    [
        (autocast, recompute, *FEW_LAYOUTS[(row + column) % 3])
        for row, autocast in enumerate((False, False, True, True))
        for column, recompute in enumerate(((), (0, 2, 4), (0, 1, 2, 3, 4)))
        if autocast or recompute
    ],
)
def test_precision(
    tmp_path: Path, autocast: bool, recompute: tuple[int, ...], workers: int, stages: Stages
) -> None:
    """The usual one, float32 with nothing recomputed, is that of all other tests."""
    result = run_toy(tmp_path, workers, stages, precision=Precision(autocast, recompute))
    assert_bits(result, reference_bits(autocast=autocast))


@pytest.mark.parametrize(("workers", "stages"), FEW_LAYOUTS)
def test_untied(tmp_path: Path, workers: int, stages: Stages) -> None:
    assert_bits(run_toy(tmp_path, workers, stages, build_model=untied), reference_bits(build_model=untied))


@pytest.mark.parametrize(
    ("workers", "stages", "recompute"),
    [(1, 1, ()), (2, 2, (1, 2)), (4, 2, ()), (4, 4, ()), (4, 4, (1, 2)), (5, 3, (1, 2))],
)
def test_tuples_and_dicts_between_layers(
    tmp_path: Path, workers: int, stages: Stages, recompute: tuple[int, ...]
) -> None:
    result = run_toy(
        tmp_path, workers, stages, build_model=build_values, precision=Precision(recompute=recompute)
    )
    assert_bits(result, reference_bits(build_model=build_values))


@pytest.mark.parametrize(
    ("workers", "stages", "micro_batches"),
    [(3, 1, 1), (4, 2, 1), (6, 3, 1), (3, 1, 2), (6, 3, 2), (1, 1, 7), (4, 2, 7), (6, 3, 7)],
)
def test_micro_batches_that_do_not_divide(
    tmp_path: Path, workers: int, stages: Stages, micro_batches: int
) -> None:
    result = run_toy(tmp_path, workers, stages, micro_batches=micro_batches)
    assert_bits(result, reference_bits(micro_batches=micro_batches))


def jumping_model() -> Any:
    layers, _ = build()
    return layers, scaled_loss


@pytest.mark.parametrize(("workers", "stages"), [(1, 1), (2, 2), (3, 1), (6, 3)])
def test_an_overflow_repeats_the_step(tmp_path: Path, workers: int, stages: Stages) -> None:
    """The loss grows a millionfold at step 3, far beyond the head-room of the scales."""
    data = partial(Jumping, 5, 3, 1e6)
    result = run_toy(tmp_path, workers, stages, build_model=jumping_model, build_data=data)
    assert_bits(result, reference_bits(build_model=jumping_model, data=data()))
    # step 1 has its probing pass, step 3 its second try
    assert [record.attempts for record in result.steps] == [2, 1, 2, 1, 1]
    assert [e for e in result.events if isinstance(e, StepRepeated)] == [StepRepeated(3, 2)]


def test_held_out_losses_do_not_disturb_training(tmp_path: Path) -> None:
    expected = toy_bits()
    held_out = []
    for workers, stages in FEW_LAYOUTS:
        result = run_toy(
            tmp_path, workers, stages, name=f"{workers}", held_out_every=2, held_out_micro_batches=3
        )
        assert_bits(result, expected)
        held_out.append([record.held_out_loss for record in result.steps])
    assert held_out[0] == held_out[1] == held_out[2]
    assert [loss is not None for loss in held_out[0]] == [False, True, False, True, True]
    assert Tokens(5).held_out(0)[0].tolist() != Tokens(5).micro_batch(1, 0)[0].tolist()


def test_clipping_that_never_bites_changes_nothing(tmp_path: Path) -> None:
    """Without clipping, and with a bound above every norm, the bits are the same; with 0.5 they are not."""
    high = OptimizerSettings(learning_rate=3e-2, warmup_steps=2, decay_steps=8, clip_norm=1e9)
    none = OptimizerSettings(learning_rate=3e-2, warmup_steps=2, decay_steps=8, clip_norm=None)
    a = run_toy(tmp_path, 3, 2, name="high", optimizer=high)
    b = run_toy(tmp_path, 2, 1, name="none", optimizer=none)
    assert a.bits == b.bits != toy_bits()
    assert OPTIMIZER.clip_norm == 0.5


def test_a_worker_sets_the_thread_count_of_its_own_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP counts threads per calling thread, and the sums inside a kernel depend on the count."""
    set_in: dict[int, int] = {}
    set_num_threads = torch.set_num_threads

    def recorded(count: int) -> None:
        set_in[threading.get_ident()] = count
        set_num_threads(count)

    monkeypatch.setattr(torch, "set_num_threads", recorded)
    run = LocalRun(toy_job(tmp_path, steps=1), tmp_path, 3, 2)
    run.run()
    assert [set_in.get(thread.ident or 0) for thread in run._threads] == [1, 1, 1]
