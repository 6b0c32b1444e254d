"""``reknit plan`` on a small model: the table, what it says, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs.amounts import bytes_of
from jobs.cli import app
from jobs.plan import layers_in_words, show_plan, sizes_of
from jobs.recipe import load_recipe

RECIPE = """
[run]
name = "small"
steps = 5

[model]
build = "jobs.bench.emulated:build"
arguments = { layers = 6, forward_seconds = 0.001 }

[data]
build = "jobs.bench.emulated:build_data"

[optimizer]
learning_rate = 1e-3

[parallel]
workers = 4
micro_batches = 8
micro_batch_size = 4
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def invoke(recipe: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", str(recipe), *arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    ("text", "count"), [("80GiB", 80 << 30), ("1.5 kb", 1500), ("512 MB", 512_000_000), ("7b", 7)]
)
def test_amounts(text: str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["80", "GiB", "80 parsecs", "-3GB", "0MB"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no amount of memory: write a number and a unit"):
        bytes_of(text)


def test_the_global_batch_stays() -> None:
    assert sizes_of(4, 6) == ((4, 6), (2, 12), (8, 3))
    assert sizes_of(1, 5) == ((1, 5),)


def test_layers_as_runs() -> None:
    assert layers_in_words((0, 1, 2, 5, 7, 8)) == "0-2 5 7-8"
    assert layers_in_words(()) == "none"


def test_the_choice_comes_first_and_its_settings_are_a_recipe(recipe: Path) -> None:
    console = Console(width=120, record=True)
    rows = show_plan(recipe, (), 4, "64MiB", 1e9, 6, console)
    text = console.export_text()
    seconds = [row.proposal.step_seconds for row in rows if row.proposal.simulated]
    assert seconds == sorted(seconds) and len(rows) == 6
    assert all(row.micro_batches * row.micro_batch_size == 32 for row in rows)
    assert all(row.proposal.memory_bytes <= 64 << 20 for row in rows)
    line = next(line for line in text.splitlines() if line.startswith("to have it: "))
    settings = [part for part in line.removeprefix("to have it: ").split() if part != "--set"]
    chosen = load_recipe(recipe, settings)
    strategy = rows[0].proposal.strategy
    assert (chosen.parallel.schedule, chosen.parallel.chunks) == (strategy.schedule, strategy.chunks)
    assert chosen.parallel.stages == len(rows[0].proposal.sizes)


def test_less_memory_needs_another_plan_and_too_little_is_said(recipe: Path) -> None:
    plenty = show_plan(recipe, (), 4, None, 1e9, 1, Console(quiet=True))[0].proposal
    less = f"{plenty.memory_bytes - 1}B"
    leaner = show_plan(recipe, (), 4, less, 1e9, 1, Console(quiet=True))[0].proposal
    assert leaner.memory_bytes < plenty.memory_bytes
    code, output = invoke(recipe, "--memory", "1KiB")
    assert code == 2
    assert "no plan for 4 workers fits 1 KiB of memory each: the leanest needs" in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--memory", "lots"), "'lots' is no amount of memory"),
        (("--workers", "0"), "--workers and --rows must be at least 1"),
        (("--link", "0"), "--link more than 0"),
    ],
)
def test_mistakes_are_one_sentence(recipe: Path, arguments: tuple[str, ...], sentence: str) -> None:
    code, output = invoke(recipe, *arguments)
    assert code == 2 and sentence in output and "Traceback" not in output
