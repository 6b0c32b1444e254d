"""The audit finds whatever is wrong with a ledger, and nothing where all is well."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.audit import audit
from runtime.samples import StepSamples, grouped

SAMPLES = 10


def ledger(steps: int = 6) -> dict[int, StepSamples]:
    """Two micro-batches of two samples a step: an epoch of ten ends within step 3 and with step 5."""
    dealt = [(number // SAMPLES, number * 7 % SAMPLES) for number in range(4 * steps)]
    return {
        step: tuple(
            (m, grouped(dealt[4 * (step - 1) + 2 * m : 4 * (step - 1) + 2 * m + 2])) for m in range(2)
        )
        for step in range(1, steps + 1)
    }


def problems(found: dict[int, StepSamples], steps: int = 6) -> str:
    return "\n".join(
        audit(found, steps=steps, micro_batches=2, samples=SAMPLES, epoch_samples=SAMPLES).problems
    )


def test_all_is_well() -> None:
    found = audit(ledger(), steps=6, micro_batches=2, samples=SAMPLES, epoch_samples=SAMPLES)
    assert (found.steps, found.used, found.epochs, found.begun, found.problems) == (6, 24, 2, 4, ())
    whole = audit(ledger(5), steps=5, micro_batches=2, samples=SAMPLES, epoch_samples=SAMPLES)
    assert (whole.epochs, whole.begun, whole.problems) == (2, 0, ())
    nothing = audit({}, steps=0, micro_batches=2, samples=SAMPLES, epoch_samples=SAMPLES)
    assert (nothing.used, nothing.epochs, nothing.problems) == (0, 0, ())


def test_a_data_set_that_leaves_some_out_each_epoch() -> None:
    found: dict[int, StepSamples] = {step: ((0, ((step - 1, (0, 1, step + 2)),)),) for step in (1, 2, 3)}
    assert audit(found, steps=3, micro_batches=1, samples=9, epoch_samples=3).problems == ()
    assert audit(found, steps=3, micro_batches=1, samples=9, epoch_samples=4).problems


def swapped(step: int, micro_batch: int, samples: Any) -> dict[int, StepSamples]:
    found = ledger()
    found[step] = tuple((m, samples if m == micro_batch else old) for m, old in found[step])
    return found


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({s: r for s, r in ledger().items() if s != 4}, "step 4 is not in the ledger"),
        ({**ledger(), 7: ledger()[6]}, "only 6 steps"),
        ({**ledger(), 2: ledger()[2][:1]}, r"step 2 used the micro-batches \[0\]"),
        ({**ledger(), 2: (*ledger()[2], ledger()[2][1])}, r"\[0, 1, 1\]"),
        ({**ledger(), 2: ledger()[1]}, "used in step 1 and again in step 2"),
        (swapped(1, 1, ((0, (4, 9)),)), "epoch 0: sample 9"),
        (swapped(1, 1, ((0, (4,)),)), "epoch 0: 9 of 10 samples were used before it ended"),
        (swapped(1, 0, ((0, (0, 10)),)), "used sample 10, but the set has 10"),
        (swapped(4, 0, ((0, (4, 1)),)), "epoch 0 after epoch 1 had begun"),
    ],
)
def test_what_is_wrong_is_found(broken: dict[int, StepSamples], words: str) -> None:
    import re

    assert re.search(words, problems(broken))
