"""What an image and a clip are worth to a captioner: held-out losses with and without them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.captions.prior import STRENGTHS, Caption, best_prior, told_prior
from jobs.captions.trained import Trained, checkpoints, held_out_loss, load


@dataclass(frozen=True)
class Spoken:
    """Nats per token over the held-out samples that have a clip: as they are, and with it taken away."""

    tokens: int
    heard: float
    muted: float


@dataclass(frozen=True)
class Losses:
    """Held-out losses in nats per token: of the model, of the same model shown other items' images, of the
    n-gram caption prior (which looks ``order`` tokens back) and of the one that smoothing by another strength
    makes best on the very captions (``smoothed``), of the same told every caption's category (``told``; None
    where all are of one), and of a model that never saw an image, at the best of its checkpoints (that of
    step ``blind_version``; None: not given). ``spoken`` is None where the model takes no sound, or no
    held-out sample has any."""

    tokens: int
    seeing: float
    exchanged: float
    prior: float
    order: int
    smoothed: float
    told: float | None = None
    blind: float | None = None
    blind_version: int | None = None
    spoken: Spoken | None = None

    def sentence(self) -> str:
        """All of it, for a person."""
        parts = [
            f"{self.seeing:.4f} per token over {self.tokens:,} tokens",
            f"{self.exchanged:.4f} with the images of other items",
            f"{self.prior:.4f} for the n-gram prior (order {self.order})",
            f"{self.smoothed:.4f} for the n-gram prior whose smoothing suits them best",
        ]
        if self.told is not None:
            parts.append(f"{self.told:.4f} for that prior told every picture's category")
        if self.blind is not None:
            best = f"at its best (step {self.blind_version})"
            parts.append(f"{self.blind:.4f} for the baseline without images {best}")
        if self.spoken is not None:
            parts.append(
                f"and {self.spoken.heard:.4f} over the {self.spoken.tokens:,} tokens of samples with a clip, "
                f"{self.spoken.muted:.4f} with the clip taken away"
            )
        return ", ".join(parts)


def losses(trained: Trained, baseline: Path | None) -> Losses:
    """``baseline`` is the folder of a run without images, of which the checkpoint that is best on the very
    data is taken: it is not beaten for having been trained too long. Raises ValueError if it sees images, or
    has read other captions."""
    seeing, tokens = held_out_loss(trained)
    blind, version = (None, None) if baseline is None else _best_blind(trained, tokens, baseline)
    exchanged = held_out_loss(trained, exchanged=True)[0]
    tokenizer = trained.curated.tokenizer
    about: Any = {"vocabulary": tokenizer.vocabulary, "end": tokenizer.end}
    train, held_out = _captions(trained, "train"), _captions(trained, "held_out")
    said = [caption for _, caption in train], [caption for _, caption in held_out]
    prior, order, _ = best_prior(*said, **about)
    smoothed, best_order, strength = best_prior(*said, strengths=STRENGTHS, **about)
    told = told_prior(train, held_out, order=best_order, strength=strength, **about)
    return Losses(tokens, seeing, exchanged, prior, order, smoothed, told, blind, version, _spoken(trained))


def _best_blind(trained: Trained, tokens: int, run: Path) -> tuple[float, int]:
    baseline = load(run)
    if baseline.recipe.data.arguments.get("images", True):
        raise ValueError(
            "the baseline was trained with images: train it with --set data.arguments.images=false"
        )
    found = []
    for version in checkpoints(run):
        baseline.turn_to(version)
        loss, others = held_out_loss(baseline)
        if others != tokens or baseline.curated.digest != trained.curated.digest:
            raise ValueError("the baseline was trained on other captions: train both on the same curated set")
        found.append((loss, version))
    return min(found)


def _spoken(trained: Trained) -> Spoken | None:
    if not trained.recipe.data.arguments.get("audio", False):
        return None
    heard, tokens = held_out_loss(trained, spoken=True)
    if not tokens:
        return None
    return Spoken(tokens, heard, held_out_loss(trained, spoken=True, muted=True)[0])


def _captions(trained: Trained, split: str) -> list[tuple[str, Caption]]:
    """(category, caption) of every row in the model's languages."""
    rows = trained.curated.table(split, ["category", "language", "tokens"]).to_pylist()
    return [
        (row["category"], (row["language"], row["tokens"]))
        for row in rows
        if row["language"] in trained.languages
    ]
