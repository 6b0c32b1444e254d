"""The shardings bench's arithmetic and the form of its report. Nothing is measured here."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from jobs.bench.report import show
from jobs.bench.shardings import CASES, Outcome, kept_bytes, recipe, report, sent_per_step
from runtime.protocol import Measured


def told(step: int, sent: int, kept: int) -> Measured:
    resident = {"parameters": kept, "shards": 1, "inbox_peak": 1 << 40}
    return Measured(0, step, {}, {}, {}, resident, {"sent": sent, "received": 0})


def test_only_settled_steps_count() -> None:
    seen = {step: told(step, 100 * step, 7 if step < 3 else 5) for step in (1, 2, 3, 4, 6)}
    assert kept_bytes(seen) == 6
    assert sent_per_step({**seen, 1: told(1, 10_000, 0)}) == 100.0
    with pytest.raises(RuntimeError, match="longer steps"):
        sent_per_step({2: seen[2], 3: seen[3]})


def test_the_report_fails_for_any_difference() -> None:
    bits = ((1.0, 2.0, 3), (0.5, 1.0, 4))
    made = [Outcome(name, offload, 1000, 1000.0, 100.5, 100.0, 10.0, 0.1, bits) for name, offload in CASES]
    assert report(made).met
    assert not report([*made, replace(made[0], kept=1001)]).met
    assert not report([*made, replace(made[0], sent=102.0)]).met
    assert not report([*made, replace(made[0], bits=(bits[0], (0.5, 1.0, 5)))]).met
    console = Console(file=StringIO(), width=220)
    show(report(made), console)
    assert isinstance(console.file, StringIO) and "zero3" in console.file.getvalue()


@pytest.mark.parametrize(("sharding", "offload"), CASES)
def test_the_bench_measures_what_it_names(sharding: str, offload: object) -> None:
    parallel = recipe(sharding, offload).parallel  # type: ignore[arg-type]
    assert parallel.sharding == sharding and (parallel.offload is None) is (offload is None)
