"""A run of a recipe with paths, in process: it verifies, and its losses are those on record."""

from __future__ import annotations

import re
from io import StringIO
from math import exp
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs.assembly import assemble
from jobs.cli import app
from jobs.evaluate import evaluate
from jobs.recipe.recipe import Recipe
from jobs.verify import verify
from runtime.run_folder import RunFolder
from tests.support.cluster import LocalRun, Result
from tests.support.ray_jobs import toy_recipe

MODEL = {"build": "tests.support.models:build", "arguments": {"depth": 6}}


def trained(folder: Path, recipe: Recipe) -> Result:
    run = LocalRun(assemble(recipe, str(folder / "checkpoints")), folder, workers=3, stages=2)
    result = run.run()
    assert result.outcome == "completed", result.message
    RunFolder(folder).recipe.write_text(recipe.to_toml(), encoding="utf-8")
    return result


def recipe_of(**sections: object) -> Recipe:
    parallel = {"workers": 3, "stages": 2, "micro_batches": 5, "micro_batch_size": 2}
    schedule = {"schedule": "skippipe"} if "paths" in sections else {}
    return toy_recipe(
        "paths",
        3,
        3,
        2,
        model=MODEL,
        data={
            "build": "tests.support.toys:build_tokens",
            "held_out_every": 3,
            "held_out_micro_batches": 4,
        },
        parallel={**parallel, **schedule},
        **sections,
    )


def test_a_run_with_paths(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = trained(folder, recipe_of(paths={"stages": 5, "taken": 3}))
    output = StringIO()
    console = Console(file=output, width=120)
    assert verify(folder, console), output.getvalue()
    full, half = evaluate(folder, console)
    last = result.steps[-1]
    assert (full.loss, half.loss) == (last.held_out_loss, last.half_depth_loss)
    assert (full.layers, half.layers) == (8, 6), "stages 0, 2 and 4 of 1 + 1, 1 and 2 layers, and the end"
    said = CliRunner().invoke(app, ["evaluate", str(folder)]).output
    assert f"{exp(half.loss):.2f}" in said and re.search(r"perplexity at half depth: [+-]\d", said)


def test_other_paths_do_not_verify(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trained(folder, recipe_of(paths={"stages": 5, "taken": 3}))
    other = recipe_of(paths={"stages": 5, "taken": 4})
    RunFolder(folder).recipe.write_text(other.to_toml(), encoding="utf-8")
    assert not verify(folder, Console(file=StringIO()))


def test_a_run_that_skips_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trained(folder, recipe_of())
    console = Console(file=StringIO())
    (full,) = evaluate(folder, console)
    again, half = evaluate(folder, console, stages=6, micro_batches=4)
    assert again == full and half.layers == 5 and half.loss != full.loss
    with pytest.raises(ValueError, match="8 layers are too few for 7 stages"):
        evaluate(folder, console, stages=7)


def test_what_a_model_is_too_short_for_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[paths\] cannot be: 8 layers are too few for 9 stages"):
        assemble(recipe_of(paths={"stages": 9, "taken": 3}), str(tmp_path))
