"""A captioner as a run's checkpoint has it: captions written greedily, and its loss on the held-out split.

The generator is a plain loop without caches over the training code's own layers, so that what it says does
not depend on how serving does it. Shape suffixes: B images, T text positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from jobs.assembly import data_arguments
from jobs.builders import build_data, build_layers
from jobs.checkpoints import checkpoint_root, fill
from jobs.data.curated import CuratedSet, open_set
from jobs.data.multimodal import MultimodalData
from jobs.models.captioner import Embedding, Row
from jobs.models.gpt import IGNORED
from jobs.recipe.recipe import Recipe, load_recipe
from runtime.checkpoint import list_checkpoints, load_manifest, newest_whole
from runtime.run_folder import RunFolder
from strategies.model import LossFunction, describe

MOST_TOKENS = 40
"""A caption is cut off there, if the model does not end it before."""


@dataclass
class Trained:
    """The state after ``version`` steps of a run of ``recipe``, whose checkpoints are in ``root``."""

    recipe: Recipe
    root: str
    version: int
    layers: list[nn.Module]
    loss: LossFunction
    curated: CuratedSet
    passed_over: tuple[str, ...] = ()
    """Why newer checkpoints are not it, a sentence each."""

    def turn_to(self, version: int) -> None:
        """Becomes the state of another of the run's checkpoints, for a fraction of what ``load`` costs."""
        fill(self.layers, describe(self.layers), self.root, load_manifest(self.root, version))
        self.version = version

    @property
    def languages(self) -> tuple[str, ...]:
        """Those that it was trained on."""
        return tuple(self.recipe.data.arguments.get("languages") or self.curated.tokenizer.languages)

    @cached_property
    def data(self) -> MultimodalData:
        """The run's data with one row in a micro-batch, so that a split ends where its rows do."""
        arguments = {**data_arguments(self.recipe), "micro_batch_size": 1, "micro_batches": 1}
        data = build_data(self.recipe.data.build, arguments)
        assert isinstance(data, MultimodalData), "checked by load"
        return data


def load(run: str | Path, version: int | None = None) -> Trained:
    """The newest whole checkpoint of the run in the folder ``run``, or that of ``version``.

    Raises ValueError if there is none, or if the run's data is no curated set, and CheckpointDamaged if that
    of ``version`` is not whole.
    """
    folder = RunFolder(run)
    versions = checkpoints(run)
    if version is not None and version not in versions:
        raise ValueError(f"{folder.path} has no checkpoint of step {version}")
    recipe = load_recipe(folder.recipe)
    root = checkpoint_root(recipe, folder)
    source = recipe.data.arguments.get("source")
    if not recipe.data.build.startswith("jobs.data.multimodal:") or not isinstance(source, str):
        raise ValueError(f"{folder.path} was not trained on a curated set: it writes no captions")
    layers, loss = build_layers(recipe.model.build, recipe.model.arguments)
    if not isinstance(layers[0], Embedding):
        raise ValueError(f"the model of {folder.path} is no captioner: it writes no captions")
    for layer in layers:
        layer.eval()
    problems: list[str] = []
    if version is None:
        manifest, problems = newest_whole(root, describe(layers))
        if manifest is None:
            raise ValueError(f"{folder.path} has no whole checkpoint: {' '.join(problems)}")
        version = manifest.version
    trained = Trained(recipe, root, version, layers, loss, open_set(source), tuple(problems))
    trained.turn_to(version)
    return trained


def checkpoints(run: str | Path) -> list[int]:
    """The versions that the run in the folder ``run`` has kept, oldest first. Raises ValueError."""
    folder = RunFolder(run)
    folder.facts()  # raises where there is no run
    versions = list_checkpoints(checkpoint_root(load_recipe(folder.recipe), folder))
    if not versions:
        raise ValueError(f"{folder.path} has no checkpoint")
    return versions


@torch.no_grad()
def captions(
    trained: Trained, images: Sequence[npt.NDArray[np.uint8]], language: str, most: int = MOST_TOKENS
) -> list[str]:
    """The likeliest next token, time after time, of each image (uint8 [size, size, 3]) in ``language``.

    Raises ValueError for a language that the set does not know.
    """
    tokenizer = trained.curated.tokenizer
    embedding = trained.layers[0]
    assert isinstance(embedding, Embedding)
    count = len(images)
    row: Row = {
        "image": torch.from_numpy(np.stack(images)[:, None]),
        "has_image": torch.ones(count, 1, dtype=torch.uint8),
        "audio": torch.zeros(count, 1, embedding.clip_samples, dtype=torch.int16),
        "has_audio": torch.zeros(count, 1, dtype=torch.uint8),
    }
    text_BT = torch.full((count, 1), tokenizer.language(language))
    ended = torch.zeros(count, dtype=torch.bool)
    while text_BT.shape[1] < min(most + 1, embedding.context) and not ended.all():
        row["tokens"], row["segment"] = text_BT, torch.zeros_like(text_BT)
        row["position"] = torch.arange(text_BT.shape[1]).expand_as(text_BT)
        value: Any = row
        for layer in trained.layers:
            value = layer(value)
        following = torch.where(ended, tokenizer.end, value[:, -1].argmax(dim=-1))
        ended |= following == tokenizer.end
        text_BT = torch.cat((text_BT, following[:, None]), dim=1)
    return [tokenizer.decode([each for each in ids[1:] if each != tokenizer.end]) for ids in text_BT.tolist()]


@torch.no_grad()
def held_out_loss(
    trained: Trained, *, exchanged: bool = False, spoken: bool = False, muted: bool = False
) -> tuple[float, int]:
    """(mean loss per token over the held-out split, number of tokens; 0 and 0 where there is none).

    ``exchanged``: every sample sees the image of its row's next sample instead of its own. ``spoken``: only
    samples that have a clip count. ``muted``: no clip is heard.
    """
    data = trained.data
    total, tokens = 0.0, 0
    for number in range(0 if data.held_out_order is None else data.held_out_order.rows_of(0)):
        inputs, targets_BT = data.held_out(number)
        if exchanged:
            there = int(inputs["segment"].max()) + 1
            for name in ("image", "has_image"):
                inputs[name][:, :there] = inputs[name][:, :there].roll(1, dims=1)
        if spoken:
            has_clip_BT = inputs["has_audio"].gather(1, inputs["segment"].clamp(min=0))
            targets_BT = targets_BT.masked_fill(has_clip_BT == 0, IGNORED)
        if muted:
            inputs["has_audio"].zero_()
        value: Any = inputs
        for layer in trained.layers:
            value = layer(value)
        loss, count = trained.loss(value, targets_BT)
        total, tokens = total + float(loss), tokens + int(count)
    return total / max(1, tokens), tokens
