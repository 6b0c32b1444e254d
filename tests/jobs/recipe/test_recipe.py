"""Recipes: what is accepted, and what of it decides the bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.builders import load_builder
from jobs.recipe.recipe import Fault, RecipeError, load_recipe
from strategies.skippipe import search as path_search

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"


def test_defaults_and_overrides(good: Path) -> None:
    recipe = load_recipe(
        good,
        [
            "parallel.workers=6",
            "parallel.stages=2",
            "reduction=fast",
            "model.arguments.tied=false",
            'precision={autocast="bf16", recompute=[3, 1, 1]}',
            "checkpoint.folder=s3://bucket/runs",
            'faults=[{step=3, worker=5, at="reduce"}]',
            "faults.0.step = 4",
        ],
    )
    assert recipe.optimizer.learning_rate == 1.0
    assert recipe.decay_steps == 10
    assert (recipe.parallel.workers, recipe.parallel.stages, recipe.reduction) == (6, 2, "fast")
    assert recipe.model.arguments == {"width": 8, "tied": False}
    assert recipe.precision.recompute == (1, 3)
    assert recipe.checkpoint.folder == "s3://bucket/runs"
    assert recipe.faults == (Fault(step=4, worker=5, at="reduce"),)
    assert load_recipe(good).parallel.stages == "auto"


def test_recipe_is_immutable(good: Path) -> None:
    recipe = load_recipe(good)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.run.steps = 11


# recipes of data sets are of another kind and have a test of their own
@pytest.mark.parametrize(
    "name", sorted(path.name for path in RECIPES.glob("*.toml") if not path.stem.endswith("-curate"))
)
def test_shipped_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / name)
    assert recipe.run.name == name.removesuffix(".toml")
    assert callable(load_builder(recipe.model.build))
    assert callable(load_builder(recipe.data.build))
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    again = load_recipe(tmp_path / "again.toml")
    assert again == recipe
    assert again.digest() == recipe.digest()


def test_digest_ignores_the_order_of_keys(good: Path, tmp_path: Path) -> None:
    sections = good.read_text().split("\n\n")
    (tmp_path / "shuffled.toml").write_text("\n\n".join(reversed(sections)))
    assert load_recipe(tmp_path / "shuffled.toml").digest() == load_recipe(good).digest()


@pytest.mark.parametrize(
    ("override", "numerics_change"),
    [
        ("run.seed=1", True),
        ("model.arguments.width=16", True),
        ("parallel.micro_batches=9", True),
        ("parallel.threads=2", True),
        ("precision.autocast=bf16", True),
        ("reduction=fast", True),
        ("run.steps=20", True),
        ("parallel.sequence_slices=2", True),
        ("parallel.workers=5", False),
        ("parallel.stages=2", False),
        ("precision.recompute=all", False),
        ("checkpoint.every=3", False),
        ("run.name=other", False),
        ("salvage=false", False),
    ],
)
def test_digests(good: Path, override: str, numerics_change: bool) -> None:
    before, after = load_recipe(good), load_recipe(good, [override])
    assert before.digest() != after.digest()
    assert (before.numerics_digest() != after.numerics_digest()) is numerics_change


def test_what_paths_are_searched_by_decides_the_bits(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(good, ["parallel.schedule=skippipe", "paths.stages=4", "paths.taken=3"])
    before = recipe.numerics_digest()
    monkeypatch.setattr(path_search, "FARTHEST", path_search.FARTHEST + 1)
    assert recipe.numerics_digest() != before


def test_paths_decide_the_bits(good: Path) -> None:
    plain = load_recipe(good)
    few, many = (
        load_recipe(good, ["parallel.schedule=skippipe", "paths.stages=4", f"paths.taken={taken}"])
        for taken in (2, 3)
    )
    assert len({recipe.numerics_digest() for recipe in (plain, few, many)}) == 3
    assert many.paths is not None and many.paths.swaps is None
    paths = ["parallel.schedule=skippipe", "paths.stages=4", "paths.taken=3"]
    with pytest.raises(RecipeError, match=r"\[paths\] does not go with parallel.sequence_slices \(2\)"):
        load_recipe(good, [*paths, "parallel.sequence_slices=2"])
    with pytest.raises(RecipeError, match=r'\[paths\] does not go with precision.recompute = "auto"'):
        load_recipe(good, [*paths, "precision.recompute=auto"])
    with pytest.raises(RecipeError, match=r'\[paths\] does not go with parallel.sharding = "auto"'):
        load_recipe(good, [*paths, "parallel.sharding=auto"])
