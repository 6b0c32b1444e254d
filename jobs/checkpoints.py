"""A run's durable checkpoints, for those who want the model and not its shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from jobs.recipe.recipe import Recipe
from runtime.checkpoint import CheckpointReader, Manifest
from runtime.layout import Layout
from runtime.run_folder import RunFolder


def checkpoint_root(recipe: Recipe, folder: RunFolder) -> str:
    """Where the run of ``recipe`` that is recorded in ``folder`` has its checkpoints: a path or URI."""
    return recipe.checkpoint.folder or str(folder.checkpoints)


def fill(layers: Sequence[nn.Module], layout: Layout, root: str, manifest: Manifest) -> None:
    """Gives ``layers`` the parameters of a checkpoint, bit for bit. Raises CheckpointDamaged."""
    with CheckpointReader(root, manifest) as reader, torch.no_grad():
        for block in layout.blocks:
            flat_N = reader.read_state(block.index, 0, block.size)[0]
            for use in layout.uses:
                if use.block == block.index:
                    tensor = use.tensor
                    values = flat_N[tensor.offset : tensor.stop].view(tensor.shape)
                    layers[use.layer].get_parameter(use.name).copy_(values)
