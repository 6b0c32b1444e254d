"""A resume that would compute other bits is refused before anything of the run is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.recipe.recipe import Recipe, load_recipe
from jobs.resuming import refuse_another_recipe
from jobs.train import train
from runtime.run_folder import RunFolder

TEXT = """
[run]
name = "again"
steps = 40
[model]
build = "jobs.models.gpt:build"
arguments = { width = 16, depth = 1, heads = 1, context = 8 }
[data]
build = "jobs.data.text:build"
arguments = { context = 8 }
[optimizer]
learning_rate = 1e-3
[parallel]
workers = 2
micro_batches = 4
micro_batch_size = 2
"""


def recipe_with(tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT)
    return load_recipe(path, overrides)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    begun = recipe_with(tmp_path)
    return RunFolder.create(tmp_path / "run", begun.to_toml(), {"numerics": begun.numerics_digest()})


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("run.steps=50", "optimizer.decay_steps is 50 and was 40"),
        ("run.seed=7", "run.seed is 7 and was 0"),
        ("model.arguments.width=32", "model.arguments.width is 32 and was 16"),
        ("model.arguments.dropout=0.5", "model.arguments.dropout is 0.5 and was None"),
        ("parallel.micro_batches=8", "parallel.micro_batches is 8 and was 4"),
        ("reduction=fast", "reduction is 'fast' and was 'exact'"),
    ],
)
def test_what_differs_is_named_and_the_run_stays_as_it_is(
    tmp_path: Path, folder: RunFolder, override: str, told: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(ValueError, match="would not go on with the run's bits") as refused:
        train(recipe_with(tmp_path, override), resume=True, run_folder=folder.path)
    assert f"({told})" in str(refused.value) and str(folder.recipe) in str(refused.value)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


@pytest.mark.parametrize(
    "overrides",
    [(), ("parallel.workers=4", "parallel.stages=2"), ("run.steps=50", "optimizer.decay_steps=40")],
    ids=["same", "layout", "longer"],
)
def test_what_keeps_the_bits_may_change(
    tmp_path: Path, folder: RunFolder, overrides: tuple[str, ...]
) -> None:
    refuse_another_recipe(recipe_with(tmp_path, *overrides), folder)


def test_a_folder_without_a_run_is_not_this_ones_concern(tmp_path: Path) -> None:
    refuse_another_recipe(recipe_with(tmp_path), RunFolder(tmp_path / "nothing"))


def test_a_recipe_that_no_longer_reads_is_named_too(tmp_path: Path, folder: RunFolder) -> None:
    folder.recipe.write_text("[run]\nold_key = 1\n")
    with pytest.raises(ValueError, match="set it as it was") as refused:
        refuse_another_recipe(recipe_with(tmp_path, "run.seed=7"), folder)
    assert str(folder.recipe) in str(refused.value)
