"""Puts a job together from a recipe: what the workers compute, as a picklable value."""

from __future__ import annotations

import secrets
from functools import partial
from pathlib import Path
from typing import Any

from actors.crew import Place
from actors.exposition import MetricsSettings
from actors.run_settings import RunSettings
from jobs.amounts import bytes_of
from jobs.builders import build_data, build_layers
from jobs.deepspeed_config import engine_settings
from jobs.recipe.choices import AUTO
from jobs.recipe.recipe import Recipe
from jobs.recipe.sharding import possible_shardings
from runtime.detection import Patience
from runtime.settings import targets_folder
from strategies.job import Fault, Job
from strategies.options import Offload, OptimizerSettings, Precision
from strategies.schedules.registry import DEFAULT
from strategies.search.formulas import FORMULAS
from strategies.search.space import Space
from strategies.shardings.registry import DEFAULT as SHARDING
from strategies.skippipe.paths import Paths, find_paths


def data_arguments(recipe: Recipe) -> dict[str, Any]:
    """The recipe's arguments for the data builder, with those that other sections decide."""
    return {
        **recipe.data.arguments,
        "micro_batch_size": recipe.parallel.micro_batch_size,
        "micro_batches": recipe.parallel.micro_batches,
        "seed": recipe.run.seed,
    }


def optimizer_settings(recipe: Recipe) -> OptimizerSettings:
    optimizer = recipe.optimizer
    return OptimizerSettings(
        learning_rate=optimizer.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=recipe.decay_steps,
        minimum_rate=optimizer.minimum_rate,
        clip_norm=optimizer.clip_norm,
    )


def targets_folder_of(recipe: Recipe) -> Path:
    """Where a run of ``recipe`` says that its metrics can be had."""
    folder = recipe.metrics.targets
    return targets_folder() if folder is None else Path(folder).expanduser().absolute()


def run_settings(recipe: Recipe, folder: Path, *, resume: bool = False) -> RunSettings:
    """What the controller of a run of ``recipe``, recorded in ``folder``, is told."""
    parallel, detection = recipe.parallel, recipe.detection
    return RunSettings(
        folder=str(folder),
        # two starts of one run, or two folders of one name, must not meet on a cluster
        name=f"{folder.name}-{secrets.token_hex(3)}",
        workers=parallel.workers,
        min_workers=parallel.min_workers,
        max_workers=parallel.max_workers,
        spares=parallel.spares,
        stages=parallel.stages,
        rebalance=parallel.rebalance,
        place=Place(parallel.cpus_per_worker, parallel.gpus_per_worker, tuple(parallel.resources.items())),
        patience=Patience(
            beat_seconds=detection.beat_seconds,
            silence_seconds=detection.silence_seconds,
            stuck_seconds=detection.stuck_seconds,
            stuck_steps=detection.stuck_steps,
        ),
        keep=recipe.checkpoint.keep,
        feed_cpus=recipe.data.feed_cpus,
        recipe=recipe.numerics_digest(),
        resume=resume,
        metrics=MetricsSettings(
            port=recipe.metrics.port if recipe.metrics.enabled else None,
            host=recipe.metrics.host,
            targets=str(targets_folder_of(recipe)),
            peak_flops=recipe.metrics.peak_flops,
        ),
    )


def paths_of(recipe: Recipe, layers: int) -> Paths | None:
    """Which of a model's ``layers`` each micro-batch passes; None: all. Raises ValueError for what cannot
    be."""
    if recipe.paths is None:
        return None
    asked = recipe.paths
    try:
        return find_paths(layers, recipe.parallel.micro_batches, asked.stages, asked.taken, asked.swaps)
    except ValueError as error:
        raise ValueError(f"[paths] cannot be: {error}") from None


def assemble(recipe: Recipe, checkpoint_root: str) -> Job:
    """The job of ``recipe``, with its checkpoints in ``checkpoint_root`` (a path or URI).

    Calls both builders once, here, so that their mistakes show before anything is started. Raises
    ValueError.
    """
    parallel, offload = recipe.parallel, recipe.parallel.offload
    layers, _ = build_layers(recipe.model.build, recipe.model.arguments)
    recomputed = _recomputed_layers(recipe, len(layers))
    _check_stages(recipe, len(layers))
    if parallel.slices > 1:
        from strategies.sequence.phases import check_phases  # who looks at a run needs no PyTorch

        check_phases(layers)
    data = build_data(recipe.data.build, data_arguments(recipe))
    _check_vocabulary(recipe, getattr(data, "vocabulary", None))
    _check_held_out(recipe, getattr(data, "held_out_samples", None))
    return Job(
        build_model=partial(build_layers, recipe.model.build, recipe.model.arguments),
        build_data=partial(build_data, recipe.data.build, data_arguments(recipe)),
        seed=recipe.run.seed,
        steps=recipe.run.steps,
        micro_batches=parallel.micro_batches,
        micro_batch_size=parallel.micro_batch_size,
        optimizer=optimizer_settings(recipe),
        precision=Precision(recipe.precision.autocast == "bf16", recomputed),
        reduction=recipe.reduction,
        salvage=recipe.salvage,
        schedule=DEFAULT if parallel.schedule == AUTO else parallel.schedule,
        chunks=parallel.chunks,
        paths=paths_of(recipe, len(layers)),
        sequence=parallel.sequence if isinstance(parallel.sequence, int) else 1,
        sequence_slices=parallel.slices,
        sharding=SHARDING if parallel.sharding == AUTO else parallel.sharding,
        offload=None if offload is None else Offload(offload.window, offload.move),
        threads=parallel.threads,
        feed_workers=recipe.data.feed_workers,
        held_out_every=recipe.data.held_out_every,
        held_out_micro_batches=recipe.data.held_out_micro_batches,
        checkpoint_every=recipe.checkpoint.every,
        checkpoint_root=checkpoint_root,
        tokens_per_sample=getattr(data, "tokens_per_sample", 0),
        inbox_limit_bytes=recipe.fabric.inbox_limit_mb << 20,
        beat_seconds=recipe.detection.beat_seconds,
        orphan_seconds=recipe.detection.orphan_seconds,
        engine=engine_settings(recipe),
        search=_space(recipe, recomputed),
        worker_memory_bytes=None if parallel.memory is None else bytes_of(parallel.memory),
        link_bytes_per_second=recipe.fabric.link_bytes_per_second,
        host_state=parallel.gpus_per_worker > 0,
        faults=tuple(
            Fault(fault.worker, fault.step, fault.at, fault.micro_batch, fault.signal)
            for fault in recipe.faults
        ),
    )


def _recomputed_layers(recipe: Recipe, layers: int) -> tuple[int, ...]:
    """Those that the recipe names, none where the search chooses. Raises ValueError."""
    recompute = recipe.precision.recompute
    if recompute in ("none", AUTO):
        return ()
    if recompute == "all":
        return tuple(range(layers))
    named = tuple(int(layer) for layer in recompute)
    if any(layer >= layers for layer in named):
        raise ValueError(
            f"precision.recompute names layer {max(named)}, but the model has {layers} layers, "
            f"counted from 0: name layers up to {layers - 1}"
        )
    return named


def _check_stages(recipe: Recipe, layers: int) -> None:
    stages, chunks = recipe.parallel.stages, recipe.parallel.chunks
    if stages == "auto":
        return
    if stages > layers:
        raise ValueError(
            f"parallel.stages ({stages}) is larger than the model's number of layers ({layers}): "
            "lower parallel.stages or build a model of more layers"
        )
    if stages * chunks > layers:
        raise ValueError(
            f"parallel.stages x chunks ({stages} x {chunks}) is more than the model's number of layers "
            f"({layers}): lower one of them or build a model of more layers"
        )


def _space(recipe: Recipe, recomputed: tuple[int, ...]) -> Space | None:
    """What plans may choose; None where the recipe says everything."""
    if not recipe.searches:
        return None
    parallel = recipe.parallel
    named = parallel.schedule != AUTO
    return Space(
        stages=None if parallel.stages == AUTO else (int(parallel.stages),),
        schedules=(parallel.schedule,) if named else tuple(FORMULAS),
        chunks=parallel.chunks if named else None,
        shardings=possible_shardings(recipe.reduction, parallel.slices)
        if parallel.sharding == AUTO
        else (parallel.sharding,),
        sequences=tuple(range(1, parallel.slices + 1)) if parallel.sequence == AUTO else (1,),
        offloads=(None if parallel.offload is None else (parallel.offload.window, parallel.offload.move),),
        recompute=None if recipe.precision.recompute == AUTO else recomputed,
    )


def _check_vocabulary(recipe: Recipe, needed: int | None) -> None:
    given = recipe.model.arguments.get("vocabulary")
    if isinstance(given, int) and needed is not None and given < needed:
        raise ValueError(
            f"model.arguments.vocabulary ({given}) is smaller than that of the data ({needed}): raise it to "
            f"{needed}"
        )


def _check_held_out(recipe: Recipe, there: int | None) -> None:
    if recipe.data.held_out_every and there == 0:
        raise ValueError(
            f"data.held_out_every ({recipe.data.held_out_every}) asks for held-out losses, but nothing is "
            "held out of the data: set it to 0, or hold something out"
        )
