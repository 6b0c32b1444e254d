"""A user's DeepSpeed configuration: read, held against the recipe, and turned into what a job needs.

A mistake is refused in one sentence that names the file, the key and the remedy, before anything starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs.recipe.errors import RecipeError
from jobs.recipe.recipe import Recipe
from strategies.engine import EngineSettings, rounds

AUTO = "auto"
"""What configurations written for other trainers say where the trainer is to fill in a value."""

_NOT_SUPPORTED: Mapping[str, str] = {
    "amp.enabled": 'use "bf16" or "fp16"',
    "elasticity.enabled": "workers come and go by parallel.min_workers and parallel.max_workers of the "
    "recipe",
    "tensor_parallel.autotp_size": "every worker holds the whole model",
    "sparse_gradients": "gradients are dense",
    "zero_optimization.round_robin_gradients": "shards are cut in the order of the parameters",
    "zero_optimization.zero_hpz_partition_size": "partitions are those of the whole group",
    "zero_optimization.mics_shard_size": "partitions are those of the whole group",
    "zero_optimization.zero_quantized_weights": "state is kept in float32",
    "zero_optimization.zero_quantized_gradients": "state is kept in float32",
    "zero_optimization.zenflow": "all state is updated in every step",
    "bf16.bf16_master_weights_and_grads": "master weights are kept in float32",
    "fp16.fp16_master_weights_and_grads": "master weights are kept in float32",
    "compile.deepcompile": "modules are taken back from an engine when the group changes",
    "data_efficiency.enabled": "the recipe's data builder decides what is read",
    "curriculum_learning.enabled": "the recipe's data builder decides what is read",
}
"""What cannot be on, and why. Of sizes, 1 is off as well."""

_OPTIMIZERS = ("adam", "adamw", "adagrad", "lion", "sgd", "rmsprop")
"""Those that keep at most two values for every element and nothing per tensor."""


def with_settings(recipe: Recipe, path: Path) -> Recipe:
    """The recipe of the file ``path`` with the content of its DeepSpeed configuration, checked.

    Raises RecipeError.
    """
    engine = recipe.engine
    if not engine.settings and engine.config is not None:
        file = Path(engine.config).expanduser()
        read = _read(file if file.is_absolute() else path.parent / file)
        engine = engine.model_copy(update={"settings": read})
        recipe = recipe.model_copy(update={"engine": engine})
    engine_settings(recipe)
    return recipe


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: there is no such file; give engine.config the path of a DeepSpeed configuration "
            f"(.json)."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); give engine.config a readable file.") from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path.name}: not valid JSON, {error}: mend that line.") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path.name}: must be a JSON object with DeepSpeed's keys.")
    return dict(_without_nulls(value))


def _without_nulls(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """TOML, in which a run keeps its recipe, knows no null; to DeepSpeed it is the same as no key."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield key, dict(_without_nulls(value))
        elif value is not None:
            yield key, value


def engine_settings(recipe: Recipe) -> EngineSettings | None:
    """What the job is told of its engine; None for Reknit's own. Raises RecipeError."""
    engine = recipe.engine
    if engine.name == "reknit":
        if engine.config is not None or engine.settings:
            raise RecipeError(
                'engine.config has no meaning here: set engine.name = "deepspeed", or remove it.'
            )
        return None
    if not engine.settings:
        raise RecipeError(
            "engine.config is missing: name the file with your DeepSpeed configuration, such as ds.json."
        )
    config, file = dict(engine.settings), Path(engine.config or "engine.settings").name
    _check_recipe(recipe)
    _check_batches(recipe, config, file)
    stage = _look(config, "zero_optimization.stage", 0)
    if stage not in (0, 1, 2, 3):
        raise RecipeError(f"{file}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}.")
    low = next((name for name in ("bf16", "fp16") if _look(config, f"{name}.enabled", False)), None)
    if low is not None and stage == 0:
        raise RecipeError(
            f"{file}: {low} without ZeRO keeps its master weights in a way that cannot be divided anew: set "
            "zero_optimization.stage to 1, 2 or 3."
        )
    _check_support(config, file)
    own_optimizer = "optimizer" in config
    if own_optimizer:
        name = str(_look(config, "optimizer.type", ""))
        if name.lower() not in _OPTIMIZERS:
            raise RecipeError(
                f"{file}: optimizer.type {name!r} cannot be divided anew: choose one of "
                f"{', '.join(_OPTIMIZERS)}, or remove optimizer to use the recipe's [optimizer]."
            )
    clip = recipe.optimizer.clip_norm
    if not own_optimizer:
        if clip is not None:
            config.setdefault("gradient_clipping", clip)
        config["zero_force_ds_cpu_optimizer"] = False  # the job's AdamW may be offloaded, too
    config.setdefault("zero_allow_untested_optimizer", True)  # those that are let through are tested here
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        config.pop(key, None)
    width = 2 if low else 4
    return EngineSettings(
        config=json.dumps(config, sort_keys=True),
        stage=stage,
        own_optimizer=own_optimizer,
        own_rate=own_optimizer or "scheduler" in config,
        alignment=16 // width if _look(config, "zero_optimization.parameter_alignment", False) else 1,
    )


def _check_recipe(recipe: Recipe) -> None:
    """What of the recipe a DeepSpeed engine has no use for must not be there."""
    parallel = recipe.parallel
    if parallel.stages not in ("auto", 1):
        raise RecipeError(
            f"parallel.stages ({parallel.stages}) has no meaning for a DeepSpeed engine, which holds the "
            "whole model on every worker: remove it."
        )
    if recipe.precision.autocast != "none":
        raise RecipeError(
            "precision.autocast has no meaning for a DeepSpeed engine: remove it, and say "
            '"bf16": {"enabled": true} in the DeepSpeed configuration.'
        )
    if recipe.precision.recompute != "none":
        raise RecipeError(
            "precision.recompute has no meaning for a DeepSpeed engine: remove it, and recompute in the "
            "model."
        )
    inside = {"reduce", "gather"}
    for index, fault in enumerate(recipe.faults):
        if fault.at in inside:
            raise RecipeError(
                f"faults.{index}.at ({fault.at}) is inside DeepSpeed's own step: choose forward, backward, "
                "exchange, optimizer, backup or checkpoint."
            )


def _check_batches(recipe: Recipe, config: Mapping[str, Any], file: str) -> None:
    """DeepSpeed's three batch sizes, where they are given, must be those of the recipe."""
    parallel = recipe.parallel
    batch = parallel.micro_batches * parallel.micro_batch_size
    wanted = {
        "train_batch_size": (
            batch,
            f"the recipe's global batch (parallel.micro_batches {parallel.micro_batches} x "
            f"parallel.micro_batch_size {parallel.micro_batch_size})",
        ),
        "train_micro_batch_size_per_gpu": (parallel.micro_batch_size, "parallel.micro_batch_size"),
        "gradient_accumulation_steps": (
            rounds(parallel.micro_batches, min(parallel.workers, parallel.micro_batches)),
            f"what {parallel.workers} workers need for parallel.micro_batches ({parallel.micro_batches})",
        ),
    }
    for key, (value, what) in wanted.items():
        given = config.get(key, AUTO)
        if given != AUTO and given != value:
            raise RecipeError(
                f"{file}: {key} ({given!r}) is not {what}, which is {value}: set it to {value}, or remove "
                "it, since the number of workers may change."
            )


def _check_support(config: Mapping[str, Any], file: str) -> None:
    for key, why in _NOT_SUPPORTED.items():
        if _look(config, key, False) not in (False, 0, 1.0, AUTO) or _look(config, key, False) is True:
            raise RecipeError(f"{file}: {key} is not supported here, since {why}: remove it.")
    for key in ("offload_optimizer", "offload_param"):
        device = _look(config, f"zero_optimization.{key}.device", "none")
        if device not in ("none", "cpu"):
            raise RecipeError(
                f'{file}: zero_optimization.{key}.device must be "cpu" or "none", not {device!r}: state on '
                "disk could not be divided anew in memory."
            )
    ratio = _look(config, "zero_optimization.offload_optimizer.ratio", 1.0)
    if ratio != 1.0:
        raise RecipeError(f"{file}: zero_optimization.offload_optimizer.ratio must be 1.0, not {ratio!r}.")


def _look(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value
