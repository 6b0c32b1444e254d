"""Shardings and offload in a recipe: what is taken over into the job, and what is refused in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.assembly import assemble
from jobs.recipe.recipe import RecipeError, load_recipe
from runtime.plan import Plan, Stage, Strategy
from strategies.options import Offload
from strategies.shardings.registry import DEFAULT, SHARDINGS

RECIPE = Path("jobs/recipes/demo.toml")
PLAN = Plan(1, (Stage(0, 1, (0,)),), ((0,),), ())
"""Of nobody's search: the recipe says how it is done."""


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_job_has_the_recipes_sharding(tmp_path: Path, sharding: str) -> None:
    recipe = load_recipe(RECIPE, [f"parallel.sharding={sharding}"])
    job = assemble(recipe, str(tmp_path))
    assert (job.sharding, job.offload) == (sharding, None)
    assert job.salvages_under(PLAN) is SHARDINGS[sharding].salvages
    assert recipe.numerics_digest() == load_recipe(RECIPE).numerics_digest(), "a run may be resumed with it"


@pytest.mark.parametrize(("sequence", "salvages"), [(1, True), (2, False), ("auto", True)])
def test_steps_are_gone_on_with_unless_the_recipe_names_teams(sequence: int | str, salvages: bool) -> None:
    recipe = load_recipe(RECIPE, [f"parallel.sequence={sequence}", "parallel.sequence_slices=4"])
    assert assemble(recipe, "").salvages_under(PLAN) is salvages


@pytest.mark.parametrize(
    ("others", "possible"),
    [
        ([], {"ddp", "zero1", "zero2", "zero3"}),
        (["reduction=fast"], {"ddp", "zero1"}),
        (["parallel.sequence=auto", "parallel.sequence_slices=4"], {"ddp", "zero1"}),
    ],
)
def test_a_sharding_that_is_to_be_chosen_is_each_plans_own(others: list[str], possible: set[str]) -> None:
    job = assemble(load_recipe(RECIPE, ["parallel.sharding=auto", "parallel.memory=1GiB", *others]), "")
    assert job.search is not None
    assert set(job.search.shardings) == possible and job.search.shardings[0] == DEFAULT
    for name in possible:
        plan = replace(PLAN, strategy=Strategy("1f1b", sharding=name))
        assert job.keeps_under(plan) == SHARDINGS[name].keeps
        assert job.salvages_under(plan) is (SHARDINGS[name].salvages and "reduction=fast" not in others)


def test_the_job_has_the_recipes_offload(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, ["parallel.offload.window=4", "parallel.offload.move=2"])
    job = assemble(recipe, str(tmp_path))
    assert job.offload == Offload(4, 2) and job.keeps_under(PLAN).streams
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    assert load_recipe(tmp_path / "again.toml") == recipe


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.sharding=zero4"], 'parallel.sharding must be "auto" or one of ddp, zero1, zero2, zero3'),
        (["parallel.offload.window=3", "parallel.offload.move=2"], "multiple of move"),
        (["parallel.offload.windows=3"], "parallel.offload.windows"),
        (["parallel.sharding=zero2", "reduction=fast"], "parallel.sharding to ddp or zero1"),
        (["parallel.sharding=zero3", "parallel.offload.window=2"], "to one of ddp, zero1, zero2"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=r"parallel\.") as refused:
        load_recipe(RECIPE, overrides)
    assert words in str(refused.value), str(refused.value)


def test_deepspeed_shards_by_its_own_configuration(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{}")
    overrides = ["engine.name=deepspeed", f"engine.config={tmp_path / 'ds.json'}", "parallel.sharding=zero3"]
    with pytest.raises(RecipeError, match=r"parallel\.sharding is of Reknit's own engine"):
        load_recipe(RECIPE, overrides)
