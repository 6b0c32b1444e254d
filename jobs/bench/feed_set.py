"""What the bench of the feed measures: curated sets, and the job that trains on each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.data.given_set import write_given_set
from jobs.data.media import encode_image
from jobs.data.tokenizer import CaptionTokenizer
from jobs.recipe.recipe import Recipe

TOKENS, SLOTS, ROWS, MICRO_BATCHES = 10, 8, 2, 2
"""Captions are all of one length, so that both sides pack the same number of samples into the same shapes."""
BATCH = SLOTS * ROWS
CONTEXT = SLOTS * (TOKENS + 1)
CROP, JITTER = 0.15, 0.2


@dataclass(frozen=True, slots=True)
class Window:
    """What a turn measured: samples a second, and the share of the time spent waiting for data."""

    samples_per_second: float
    data_wait_share: float


@dataclass(frozen=True, eq=False, slots=True)
class Regime:
    """A set of ``files`` of ``rows`` images of ``image`` x ``image`` pixels, and the model that is trained on
    it. A turn lasts ``steps`` after ``warm_up``, less than an epoch together: so much less that Ray Data,
    which prepares ahead as fast as it can while it has memory, is not through with the set before the
    measured steps begin, as it would not be with a large one."""

    name: str
    image: int
    build: str
    arguments: dict[str, Any]
    files: int
    rows: int
    warm_up: int
    steps: int

    def __post_init__(self) -> None:
        samples = MICRO_BATCHES * BATCH
        assert (self.warm_up + self.steps) * samples < self.files * self.rows, "no epoch ends in a turn"


PREPARING = Regime(
    name="preparing is the bottleneck",
    image=128,
    build="jobs.bench.glance:build",
    arguments={"width": 8},
    files=12,
    rows=256,
    warm_up=16,
    steps=64,
)
TRAINING = Regime(
    name="training is the bottleneck",
    image=64,
    build="jobs.models.captioner:build",
    arguments={
        "image_size": 64,
        "patch": 16,
        "width": 128,
        "depth_image": 2,
        "depth_text": 3,
        "heads": 4,
        "context": CONTEXT,
    },
    files=4,
    rows=864,
    warm_up=4,
    steps=12,
)


def write_set(folder: Path, regime: Regime) -> int:
    """Writes a curated set of noise with letters below it; returns the tokenizer's vocabulary."""
    tokenizer = CaptionTokenizer(["en"])
    draws = np.random.default_rng(0)
    splits = {
        split: [
            [_drawn(draws, f"{split}{number}-{row}", tokenizer, regime.image) for row in range(rows)]
            for number in range(files)
        ]
        for split, files, rows in (("train", regime.files, regime.rows), ("held_out", 1, BATCH))
    }
    write_given_set(folder, tokenizer, splits, rows_per_group=128, image_size=regime.image)
    return tokenizer.vocabulary


def _drawn(draws: np.random.Generator, name: str, tokenizer: CaptionTokenizer, size: int) -> dict[str, Any]:
    caption = "".join(chr(97 + int(letter)) for letter in draws.integers(0, 26, TOKENS))
    coarse = draws.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    return {
        "sample": name,
        "item": name,
        "category": "drawn",
        "language": "en",
        "caption": caption,
        "tokens": tokenizer.encode(caption),
        "image": encode_image(coarse.repeat(size // 8, axis=0).repeat(size // 8, axis=1)),
        "audio": None,
        "width": size,
        "height": size,
    }


def recipe(source: Path, vocabulary: int, regime: Regime, reduction: str) -> Recipe:
    """The run that is measured. It would go on for longer than the bench lasts."""
    return Recipe.model_validate(
        {
            "run": {"name": "feed", "steps": 1_000_000, "seed": 1},
            "model": {"build": regime.build, "arguments": {**regime.arguments, "vocabulary": vocabulary}},
            "data": {
                "build": "jobs.data.multimodal:build",
                "arguments": {
                    "source": str(source),
                    "context": CONTEXT,
                    "slots": SLOTS,
                    "crop": CROP,
                    "jitter": JITTER,
                },
                "feed_workers": 1,
                "feed_cpus": 0.0,  # Ray's slots are the peer's; one process prepares nonetheless
            },
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 10, "clip_norm": 1.0},
            "parallel": {
                "workers": 1,
                "stages": 1,
                "micro_batches": MICRO_BATCHES,
                "micro_batch_size": ROWS,
                "cpus_per_worker": 0.0,
            },
            "reduction": reduction,
            "metrics": {"enabled": False},
            # whoever is not at turn is stopped on purpose
            "detection": {"silence_seconds": 3600.0, "stuck_seconds": 3600.0},
        }
    )
