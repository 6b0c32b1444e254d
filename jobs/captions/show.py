"""A sample of captions for the terminal, while a captioner is being trained."""

from __future__ import annotations

from pathlib import Path

import torch

from jobs.captions.page import held_out_items
from jobs.captions.trained import load

ITEMS = 3


def lines(run: Path, version: int) -> list[str]:
    """What the model of step ``version`` says of the first held-out images, in its first language."""
    trained = load(run, version)
    torch.set_num_threads(trained.recipe.parallel.threads)
    return [
        f"step {version}  {shown.item}: “{said.written}” (really: {said.true or 'no caption'})"
        for shown in held_out_items(trained, ITEMS)
        for said in shown.said[:1]
    ]
