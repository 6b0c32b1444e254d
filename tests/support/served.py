"""Run folders with checkpoints of models that were never trained, for tests of serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.assembly import build_layers
from jobs.bench import untrained
from jobs.models.captioner import CaptionHead
from jobs.models.gpt import Head
from jobs.recipe.recipe import Recipe
from jobs.serving.decoder import decoder_of
from jobs.serving.engine import Engine
from jobs.serving.generation import Generation, Prompt, Sampling
from jobs.serving.service import Service
from runtime.run_folder import RunFolder

CONTEXT = 512
GPT = {"width": 32, "depth": 2, "heads": 2, "context": CONTEXT, "vocabulary": 256, "tied": False}


def make_run(
    folder: Path, *, model: str = "jobs.models.gpt:build", arguments: Any = None, data: Any = None
) -> Recipe:
    """A run folder without a checkpoint."""
    recipe = Recipe.model_validate(
        {
            "run": {"name": "served", "steps": 100, "seed": 1},
            "model": {"build": model, "arguments": GPT if arguments is None else arguments},
            "data": data or {},
            "optimizer": {"learning_rate": 1e-3},
            "parallel": {"workers": 1, "micro_batches": 1, "micro_batch_size": 1},
        }
    )
    RunFolder.create(folder, recipe.to_toml(), {"seed": 1})
    return recipe


def layers_of(recipe: Recipe, seed: int, scale: float = 4.0) -> list[nn.Module]:
    """A model whose answers vary: its matrices are ``scale`` times as large as at the start of training.

    A GPT's likeliest bytes are printable, so that texts are as different as tokens.
    """
    torch.manual_seed(seed)
    layers, _ = build_layers(recipe.model.build, recipe.model.arguments)
    with torch.no_grad():
        for parameter in {id(p): p for layer in layers for p in layer.parameters() if p.ndim == 2}.values():
            parameter.mul_(scale)
        if isinstance(layers[-1], Head) and not isinstance(layers[-1], CaptionHead):
            layers[-1].weight[:32] = 0.0
            layers[-1].weight[127:] = 0.0
    return layers


def write_checkpoint(folder: Path, recipe: Recipe, version: int, seed: int) -> list[nn.Module]:
    """Checkpoint ``version`` of the model that ``seed`` makes, which is returned."""
    layers = layers_of(recipe, seed)
    untrained.write_checkpoint(folder, recipe, version, layers)
    return layers


def damage(folder: Path, version: int) -> None:
    """Flips a bit in one of the files of checkpoint ``version``."""
    file = next((RunFolder(folder).checkpoints / f"step-{version:08d}").glob("worker-*"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def expected_text(layers: list[nn.Module], prompt: str, most: int, sampling: Sampling | None = None) -> str:
    """What an engine of its own answers."""
    engine = Engine(0, decoder_of(layers, torch.device("cpu")))
    engine.submit(0, Generation(Prompt(tuple(prompt.encode())), most, sampling or Sampling()))
    tokens: list[int] = []
    while not engine.is_idle:
        tokens += [told.token for told in engine.step() if told.token is not None]
    return "".join(Service("", "completions", 0).decode_stream(tokens))
