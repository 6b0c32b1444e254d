"""``reknit plan`` on a small model: the table, what it says, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from jobs.amounts import bytes_of
from jobs.assembly import assemble
from jobs.cli import app
from jobs.plan import layers_in_words, measured_costs, show_plan, sizes_of, space_of
from jobs.recipe.recipe import load_recipe

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


@pytest.mark.parametrize("text", ["80", "GiB", "80 parsecs", "-3GB", "0MB", "0.4B", "0.0001kb"])
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


SEQUENCES = """
[run]
name = "long"
steps = 5

[model]
arguments = { width = 16, depth = 2, heads = 4, context = 64 }

[data]
arguments = { context = 64 }

[optimizer]
learning_rate = 1e-3

[parallel]
workers = 4
sequence_slices = 4
micro_batches = 1
micro_batch_size = 1
"""


def test_teams_are_weighed_and_their_settings_are_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "long.toml"
    path.write_text(SEQUENCES, encoding="utf-8")
    console = Console(width=140, record=True)
    rows = show_plan(path, ("parallel.stages=1",), 4, None, 1e12, 100, console)
    text = console.export_text()
    teams = {row.proposal.strategy.sequence for row in rows}
    assert teams == {1, 2, 4} and " team " in text
    assert {row.proposal.strategy.sharding for row in rows} == {"ddp", "zero1"}
    # one micro-batch keeps four workers busy as one team, and with links of no weight that is quickest
    assert rows[0].proposal.strategy.sequence == 4
    line = next(line for line in text.splitlines() if line.startswith("to have it: "))
    settings = [part for part in line.removeprefix("to have it: ").split() if part != "--set"]
    chosen = load_recipe(path, settings).parallel
    assert (chosen.sequence, chosen.slices) == (4, 4)


def test_what_could_not_be_cut_into_its_slices_is_refused_as_by_a_worker(tmp_path: Path) -> None:
    path = tmp_path / "long.toml"
    path.write_text(SEQUENCES, encoding="utf-8")
    code, output = invoke(path, "--set", "parallel.sequence_slices=65")
    assert code == 2 and "a sequence of 64 tokens cannot be cut into 65 slices" in output


def test_teams_of_a_short_sequence_are_weighed_by_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    path.write_text(SEQUENCES.replace("context = 64", "context = 6"), encoding="utf-8")
    job = assemble(load_recipe(path), "")
    costs = measured_costs(job, torch.device("cpu"), 1e9)
    assert [layer.heads for layer in costs.sharing] == [0, 4, 4, 0] and costs.slices == 4
    # without slices the largest team has more members than there are tokens: none is weighed
    free = load_recipe(path, ("parallel.sequence_slices=1",))
    costs = measured_costs(assemble(free, ""), torch.device("cpu"), 1e9)
    assert not costs.sharing and space_of(free, costs).sequences == (1,)


@pytest.mark.parametrize("more", [(), ("parallel.offload={window=2,move=1}",)])
def test_settings_that_name_everything_go_without_the_memory_of_a_search(
    recipe: Path, more: tuple[str, ...]
) -> None:
    console = Console(width=140, record=True)
    searched = ("parallel.schedule=auto", "parallel.memory=64MiB", *more)
    show_plan(recipe, searched, 4, None, 1e9, 1, console)
    found = next(each for each in console.export_text().splitlines() if each.startswith("to have it: "))
    settings, _, without = found.removeprefix("to have it: ").partition(", without ")
    asked = [part for part in settings.split() if part != "--set"]
    keys = [f"parallel.{key}" for key in ("memory", *(["offload"] if more else []))]
    assert without.split(" and ") == keys
    with pytest.raises(ValueError, match=r"parallel\.memory has a meaning only for a search"):
        load_recipe(recipe, [*searched, *asked])
    kept = [each for each in searched if not each.startswith(tuple(f"{key}=" for key in keys))]
    assert not load_recipe(recipe, [*kept, *asked]).searches


def test_offloading_is_weighed_for_workers_with_memory_of_their_own(recipe: Path) -> None:
    console = Console(width=140, record=True)
    gpu = ("parallel.gpus_per_worker=1", "parallel.cpus_per_worker=0")
    rows = show_plan(recipe, gpu, 4, None, 1e9, 200, console)
    assert {row.proposal.strategy.offload for row in rows} == {None, (2, 1)}
    assert "host memory taken to send" in console.export_text()
    assert not any(
        row.proposal.strategy.offload and row.proposal.strategy.sharding == "zero3" for row in rows
    )
    plain = show_plan(recipe, (), 4, None, 1e9, 200, Console(quiet=True))
    assert {row.proposal.strategy.offload for row in plain} == {None}
