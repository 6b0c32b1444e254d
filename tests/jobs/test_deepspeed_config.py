"""A person's DeepSpeed configuration: what it becomes, and the sentence that says what is wrong with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.deepspeed_config import engine_settings
from jobs.recipe.recipe import Recipe, RecipeError, load_recipe
from tests.support.ray_jobs import toy_recipe

ADAM = {"type": "AdamW", "params": {"lr": 1e-3}}


def recipe_file(folder: Path, config: Any, **sections: Any) -> Path:
    """A recipe and the configuration that it names beside it."""
    (folder / "ds.json").write_text(config if isinstance(config, str) else json.dumps(config))
    recipe = toy_recipe("ds", 5, 2, "auto", engine={"name": "deepspeed", "config": "ds.json"}, **sections)
    path = folder / "recipe.toml"
    path.write_text(recipe.to_toml())
    return path


def test_a_configuration_is_read_beside_the_recipe_and_kept_in_it(tmp_path: Path) -> None:
    config = {
        "train_batch_size": 10,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 3,
        "zero_optimization": {"stage": 2, "offload_param": None},
        "optimizer": ADAM,
    }
    recipe = load_recipe(recipe_file(tmp_path, config))
    (tmp_path / "ds.json").unlink()
    again = tmp_path / "again.toml"
    again.write_text(recipe.to_toml())
    assert load_recipe(again) == recipe
    settings = engine_settings(recipe)
    assert settings is not None and settings.stage == 2
    assert settings.own_optimizer and settings.own_rate
    kept = {"zero_optimization": {"stage": 2}, "optimizer": ADAM, "zero_allow_untested_optimizer": True}
    assert json.loads(settings.config) == kept


def test_without_an_optimizer_of_its_own_the_recipes_is_used(tmp_path: Path) -> None:
    settings = engine_settings(load_recipe(recipe_file(tmp_path, {"zero_optimization": {"stage": 1}})))
    assert settings is not None and not settings.own_optimizer and not settings.own_rate
    assert json.loads(settings.config)["gradient_clipping"] == 0.5


def test_the_default_is_reknits_own_engine() -> None:
    assert engine_settings(toy_recipe("own", 5, 2, "auto")) is None


def test_what_decides_the_bits_is_part_of_the_numerics(tmp_path: Path) -> None:
    own = toy_recipe("own", 5, 2, "auto")
    one = load_recipe(recipe_file(tmp_path, {"zero_optimization": {"stage": 1}}))
    other = load_recipe(recipe_file(tmp_path, {"zero_optimization": {"stage": 2}}))
    assert len({each.numerics_digest() for each in (own, one, other)}) == 3


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"train_batch_size": 12}, "ds.json: train_batch_size (12) is not the recipe's global batch"),
        ({"train_batch_size": 12}, "which is 10: set it to 10, or remove it"),
        (
            {"train_micro_batch_size_per_gpu": 3},
            "ds.json: train_micro_batch_size_per_gpu (3) is not parallel",
        ),
        ({"gradient_accumulation_steps": 5}, "is not what 2 workers need for parallel.micro_batches (5)"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be 0, 1, 2 or 3, not 4"),
        ({"bf16": {"enabled": True}}, "ds.json: bf16 without ZeRO keeps its master weights"),
        (
            {"optimizer": {"type": "OneBitAdam"}},
            "ds.json: optimizer.type 'OneBitAdam' cannot be divided anew",
        ),
        (
            {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
            "ds.json: zero_optimization.round_robin_gradients is not supported here",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            'ds.json: zero_optimization.offload_param.device must be "cpu" or "none"',
        ),
        ("{", "ds.json: not valid JSON"),
        ("[]", "ds.json: must be a JSON object"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(tmp_path: Path, config: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(sentence)) as found:
        load_recipe(recipe_file(tmp_path, config))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"precision": {"autocast": "bf16"}}, "precision.autocast has no meaning for a DeepSpeed engine"),
        ({"precision": {"recompute": "all"}}, "precision.recompute has no meaning"),
        (
            {"faults": [{"step": 1, "worker": 0, "at": "gather"}]},
            "faults.0.at (gather) is inside DeepSpeed's own step",
        ),
    ],
)
def test_what_an_engine_has_no_use_for_is_refused(
    tmp_path: Path, sections: dict[str, Any], sentence: str
) -> None:
    path = recipe_file(tmp_path, {"zero_optimization": {"stage": 1}}, **sections)
    with pytest.raises(RecipeError, match=re.escape(sentence)):
        load_recipe(path)


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, {})
    (tmp_path / "ds.json").unlink()
    with pytest.raises(RecipeError, match=r"ds\.json: there is no such file"):
        load_recipe(path)


def test_a_configuration_without_an_engine_is_refused() -> None:
    recipe = Recipe.model_validate(
        {**toy_recipe("own", 5, 2, "auto").model_dump(), "engine": {"config": "ds.json"}}
    )
    with pytest.raises(RecipeError, match=r"engine\.config has no meaning here"):
        engine_settings(recipe)
