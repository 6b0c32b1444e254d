"""A run's checkpoints as models that can generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from jobs.builders import build_layers
from jobs.checkpoints import checkpoint_root, fill
from jobs.data.curated import open_set
from jobs.recipe.recipe import Recipe, load_recipe
from jobs.serving.decoder import CaptionDecoder, Decoder, decoder_of
from jobs.serving.service import Service
from runtime.checkpoint import (
    CheckpointDamaged,
    Manifest,
    list_checkpoints,
    load_manifest,
    newest_whole,
)
from runtime.run_folder import RunFolder
from strategies.model import describe

_BYTES = 256


@dataclass(frozen=True)
class RunSource:
    """Where the models of a run come from. ``pinned`` is the only checkpoint to serve, None: the newest.
    Picklable. Raises ValueError for a folder without a run.
    """

    run: Path
    pinned: int | None = None

    def __post_init__(self) -> None:
        RunFolder(self.run).facts()

    @property
    def name(self) -> str:
        return RunFolder(self.run).name

    @property
    def recipe(self) -> Recipe:
        return load_recipe(RunFolder(self.run).recipe)

    def first(self) -> tuple[int, Decoder]:
        """The model to begin with. Raises ValueError if there is none to be had."""
        if self.pinned is None:
            found = self.newer_than(-1)
            if found is None:
                raise ValueError(
                    f"{self.run} has no whole checkpoint yet: wait for the first one, or set "
                    "checkpoint.every in its recipe"
                )
            return found
        try:
            return self.pinned, self.load(self.pinned)
        except CheckpointDamaged as error:
            there = ", ".join(map(str, list_checkpoints(self._root(self.recipe)))) or "none"
            raise ValueError(
                f"step {self.pinned} cannot be served: {error} The run's checkpoints are: {there}"
            ) from None

    def newer_than(self, version: int) -> tuple[int, Decoder] | None:
        """The newest whole checkpoint, if it is newer. Cheap where no folder is."""
        root = self._root(self.recipe)
        listed = list_checkpoints(root)
        if not listed or listed[-1] <= version:
            return None
        layers = self._layers()
        manifest, _ = newest_whole(root, describe(layers))
        if manifest is None or manifest.version <= version:
            return None
        return manifest.version, self._filled(layers, manifest)

    def load(self, version: int) -> Decoder:
        """The model of one checkpoint. Raises CheckpointDamaged if it is not there, or not whole."""
        manifest = load_manifest(self._root(self.recipe), version)
        return self._filled(self._layers(), manifest)

    def _layers(self) -> list[nn.Module]:
        recipe = self.recipe
        layers, _ = build_layers(recipe.model.build, recipe.model.arguments)
        return layers

    def _filled(self, layers: list[nn.Module], manifest: Manifest) -> Decoder:
        fill(layers, describe(layers), self._root(self.recipe), manifest)
        return decoder_of(layers, torch.device("cpu"))

    def _root(self, recipe: Recipe) -> str:
        return checkpoint_root(recipe, RunFolder(self.run))


def service_of(source: RunSource, decoder: Decoder) -> Service:
    """The service of a run whose model is ``decoder``. Raises ValueError if its tokens have no text."""
    if not isinstance(decoder, CaptionDecoder):
        if decoder.vocabulary != _BYTES:
            raise ValueError(
                f"the model of {source.name} has {decoder.vocabulary} tokens, and only bytes (256) can be "
                "turned into text without a tokenizer"
            )
        return Service(source.name, "completions", decoder.context)
    folder = source.recipe.data.arguments.get("source")
    if not isinstance(folder, str):
        raise ValueError(
            f"the recipe of {source.name} names no curated set (data.arguments.source), whose tokenizer is "
            "needed to write captions"
        )
    curated = open_set(folder)
    if curated.tokenizer.vocabulary > decoder.vocabulary or not curated.tokenizer.languages:
        raise ValueError(
            f"the curated set in {folder} has {curated.tokenizer.vocabulary} tokens but the model "
            f"{decoder.vocabulary}: it is not the set that the run was trained on"
        )
    return Service(
        source.name,
        "caption",
        decoder.context,
        decoder.prefix,
        curated.tokenizer,
        decoder.image_size,
        curated.manifest.audio_rate if decoder.audio_samples else None,
        tuple(source.recipe.data.arguments.get("languages") or curated.tokenizer.languages),
    )
