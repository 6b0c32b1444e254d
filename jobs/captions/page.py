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

from jobs.captions.prior import Caption, best_prior
from jobs.captions.trained import Trained, captions, checkpoints, held_out_loss, load
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


@dataclass(frozen=True)
class Losses:
    """Held-out losses in nats per token: of the model, of the same model shown other items' images, of the
    n-gram caption prior (which looks ``order`` tokens back), and of a model that never saw an image, at the
    best of its checkpoints (that of step ``blind_version``; None: not given)."""

    tokens: int
    seeing: float
    exchanged: float
    prior: float
    order: int
    blind: float | None = None
    blind_version: int | None = None


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


def losses(trained: Trained, baseline: Path | None) -> Losses:
    """``baseline`` is the folder of a run without images, of which the checkpoint that is best on the very
    data is taken: it is not beaten for having been trained too long. Raises ValueError if it sees images, or
    has read other captions."""
    seeing, tokens = held_out_loss(trained)
    blind: tuple[float, int] | None = None
    if baseline is not None:
        blind = min(_blind_loss(trained, tokens, baseline, version) for version in checkpoints(baseline))
    prior, order = caption_prior(trained)
    exchanged = held_out_loss(trained, exchanged=True)[0]
    return Losses(tokens, seeing, exchanged, prior, order, *(blind or ()))


def _blind_loss(trained: Trained, tokens: int, run: Path, version: int) -> tuple[float, int]:
    baseline = load(run, version)
    if baseline.recipe.data.arguments.get("images", True):
        raise ValueError(
            "the baseline was trained with images: train it with --set data.arguments.images=false"
        )
    loss, others = held_out_loss(baseline)
    if others != tokens or baseline.curated.digest != trained.curated.digest:
        raise ValueError("the baseline was trained on other captions: train both on the same curated set")
    return loss, version


def caption_prior(trained: Trained) -> tuple[float, int]:
    """``best_prior`` fitted to the captions that the model was trained on."""
    tokenizer = trained.curated.tokenizer

    def said(split: str) -> list[Caption]:
        rows = trained.curated.table(split, ["language", "tokens"]).to_pylist()
        return [(row["language"], row["tokens"]) for row in rows if row["language"] in trained.languages]

    return best_prior(said("train"), said("held_out"), vocabulary=tokenizer.vocabulary, end=tokenizer.end)


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
    torch.set_num_threads(trained.recipe.parallel.threads)
    found = losses(trained, baseline)
    items = held_out_items(trained)
    path, version = run / "captions.html", trained.version
    path.write_text(render(trained, found, items), encoding="utf-8")
    blind = (
        ""
        if found.blind is None
        else f", {found.blind:.4f} for the baseline without images at its best (step {found.blind_version})"
    )
    console.print(
        f"held-out loss of step {version}: {found.seeing:.4f} per token over {found.tokens:,} tokens, "
        f"{found.exchanged:.4f} with the images of other items, "
        f"{found.prior:.4f} for the n-gram prior (order {found.order}){blind}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"{path} shows {len(items)} held-out images", highlight=False, soft_wrap=True)
    return path
