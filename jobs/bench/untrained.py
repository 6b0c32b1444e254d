"""Run folders with a checkpoint of a model that was never trained: speed does not depend on what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from jobs.recipe.recipe import Recipe
from runtime.checkpoint import ROWS, write_manifest, write_shards
from runtime.run_folder import RunFolder
from strategies.model import Model, describe, flat_parameters


def write_checkpoint(folder: Path, recipe: Recipe, version: int, layers: Sequence[nn.Module]) -> None:
    """Checkpoint ``version`` with the parameters of ``layers``, in the run folder ``folder``."""
    layout = describe(layers)
    model = Model(list(layers), lambda output, targets: (output, 1), layout)
    pieces = {}
    for block in layout.blocks:
        state = torch.zeros(ROWS, block.size)
        state[0] = flat_parameters(model, block)
        pieces[(block.index, 0, block.size)] = state
    root = RunFolder(folder).checkpoints
    file = write_shards(root, version, 0, 0, pieces)
    write_manifest(root, version, layout, [file], exponents=None, recipe=recipe.numerics_digest())
