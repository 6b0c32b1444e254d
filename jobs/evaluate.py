"""``reknit evaluate``: the held-out loss of a run's newest checkpoint, by the whole model and by half its
stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, fsum
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from jobs.assembly import data_arguments, paths_of
from jobs.builders import build_data, build_layers
from jobs.checkpoints import checkpoint_root, fill
from jobs.recipe.recipe import load_recipe
from jobs.reference import Loss
from runtime.checkpoint import newest_whole
from runtime.run_folder import RunFolder
from strategies.model import describe
from strategies.pipeline import Data
from strategies.skippipe.paths import find_paths


@dataclass(frozen=True, slots=True)
class Depth:
    """The mean ``loss`` per sample or token by ``layers`` of the model's."""

    name: str
    layers: int
    loss: float

    @property
    def perplexity(self) -> float:
        return exp(self.loss)


def evaluate(
    run: str | Path, console: Console, *, stages: int | None = None, micro_batches: int | None = None
) -> tuple[Depth, ...]:
    """Prints the losses by all stages and by every other one (``Paths.half``), and returns them.

    ``stages``: in how many the model is cut; default: the recipe's, and without [paths] in it only the whole
    model is looked at. ``micro_batches`` of held-out data, default: the recipe's. One plain process; the
    layers draw no dropout.

    Raises ValueError if there is no run, no whole checkpoint, no held-out data, or too few layers.
    """
    folder = RunFolder(run)
    recipe = load_recipe(folder.recipe)
    layers, loss = build_layers(recipe.model.build, recipe.model.arguments)
    layout = describe(layers)
    root = checkpoint_root(recipe, folder)
    manifest, problems = newest_whole(root, layout)
    for problem in problems:
        console.print(problem, highlight=False, soft_wrap=True)
    if manifest is None:
        raise ValueError(f"{folder.path} has no checkpoint to evaluate")
    fill(layers, layout, root, manifest)
    torch.set_num_threads(recipe.parallel.threads)
    data = build_data(recipe.data.build, data_arguments(recipe))
    number = micro_batches or recipe.data.held_out_micro_batches
    if stages is None:
        paths = paths_of(recipe, len(layers))
    else:
        paths = find_paths(len(layers), 1, stages, taken=stages)
    orders = {"full": tuple(range(len(layers)))}
    if paths is not None:
        orders["half"] = paths.layers_of(paths.half)
    autocast = recipe.precision.autocast == "bf16"
    found = tuple(
        Depth(name, len(order), mean_loss(layers, loss, data, order, number, autocast=autocast))
        for name, order in orders.items()
    )
    console.print(_table(f"{folder.name}, step {manifest.version}", found, len(layers)))
    return found


def mean_loss(
    layers: Sequence[nn.Module],
    loss: Loss,
    data: Data,
    order: Sequence[int],
    micro_batches: int,
    *,
    autocast: bool = False,
) -> float:
    """The mean over held-out micro-batches 0 to ``micro_batches`` - 1 that pass the layers ``order``."""
    sums, count = [], 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for micro_batch in range(micro_batches):
            x, targets = data.held_out(micro_batch)
            for layer in order:
                x = layers[layer].eval()(x)
            summed, samples = loss(x, targets)
            sums.append(float(summed))
            count += int(samples)
    return fsum(sums) / count


def _table(title: str, found: Sequence[Depth], layers: int) -> Table:
    table = Table(title=title)
    for column in ("depth", "layers", "held-out loss", "perplexity"):
        table.add_column(column, justify="right")
    for each in found:
        table.add_row(each.name, f"{each.layers} of {layers}", f"{each.loss:.4f}", f"{each.perplexity:.2f}")
    if len(found) > 1:
        table.caption = f"perplexity at half depth: {found[1].perplexity / found[0].perplexity - 1.0:+.1%}"
    return table
