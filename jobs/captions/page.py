"""``reknit captions``: a page of held-out images with what a run's model says, and what seeing is worth."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import torch
from rich.console import Console

from jobs.captions.losses import Losses, losses
from jobs.captions.trained import Trained, captions, load
from jobs.data.media import decode_pixels

MOST_ITEMS = 120
MOST_LANGUAGES = 4


@dataclass(frozen=True)
class Said:
    """A caption in one language: the set's own (None where it has none), and the model's."""

    language: str
    true: str | None
    written: str


@dataclass(frozen=True)
class Shown:
    """One held-out item; ``image`` is a PNG."""

    item: str
    category: str
    image: bytes
    said: tuple[Said, ...]

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.image).decode()


def held_out_items(trained: Trained, most: int = MOST_ITEMS) -> list[Shown]:
    """The first items of the held-out split that have an image, with the model's captions."""
    columns = ["item", "category", "language", "caption", "image"]
    rows: list[dict[str, Any]] = trained.curated.table("held_out", columns).to_pylist()
    true = {(row["item"], row["language"]): row["caption"] for row in rows}
    first = {row["item"]: row for row in reversed(rows) if row["image"] is not None}
    chosen = [row for row in rows if first.get(row["item"]) is row][:most]
    if not chosen:
        return []
    languages = trained.languages[:MOST_LANGUAGES]
    images = [decode_pixels(row["image"]) for row in chosen]
    written = {language: captions(trained, images, language) for language in languages}
    return [
        Shown(
            row["item"],
            row["category"],
            row["image"],
            tuple(
                Said(language, true.get((row["item"], language)), written[language][place])
                for language in languages
            ),
        )
        for place, row in enumerate(chosen)
    ]


def render(trained: Trained, found: Losses, items: list[Shown]) -> str:
    """The page: one HTML file that needs nothing else."""
    template = files("jobs.captions").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        name=trained.recipe.run.name,
        version=trained.version,
        steps=trained.recipe.run.steps,
        losses=found,
        items=items,
        languages=trained.languages,
    )


def write_page(run: Path, baseline: Path | None, console: Console) -> Path:
    """Writes ``captions.html`` into the run folder and says in figures what it shows. Raises ValueError."""
    trained = load(run)
    for problem in trained.passed_over:
        console.print(problem, highlight=False, soft_wrap=True)
    torch.set_num_threads(trained.recipe.parallel.threads)
    found = losses(trained, baseline)
    items = held_out_items(trained)
    path, version = run / "captions.html", trained.version
    path.write_text(render(trained, found, items), encoding="utf-8")
    console.print(f"held-out loss of step {version}: {found.sentence()}", highlight=False, soft_wrap=True)
    console.print(f"{path} shows {len(items)} held-out images", highlight=False, soft_wrap=True)
    return path
