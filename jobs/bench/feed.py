"""The feed beside Ray Train's: samples a second and the share of a step spent waiting for data.

Both train the same captioner on the same Parquet files on the same cores: one worker that trains and one CPU
that reads, decodes and augments. Ours has the exact order (a shuffle of the whole set, packed, every sample
once an epoch); Ray Train's ``iter_torch_batches`` reads the files as they come, the easiest it can have.

Samples a second are training's. Preparing takes a tenth of what training takes, on a core of its own, so that
the ratio is mostly that of the steps themselves: ours are measured with exact sums, and with float32 ones, as
the peer's are.

Both compute the same layers in float32 with one thread, as many samples in a call and as many calls in a
step, keep all activations, divide by the tokens, clip and update by AdamW; neither wants gradients of the
images. What is not alike: our allocator keeps what is freed, our AdamW is torch's fused one with the recipe's
decay and warm-up, and the peer adds in place in ``.grad``, reports no loss and keeps no state that would
survive a fault.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from actors.cluster import connect
from jobs.bench.report import BenchReport
from jobs.bench.resident import started
from jobs.builders import build_layers
from jobs.data.augment import Augmentation, augmented
from jobs.data.given_set import write_given_set
from jobs.data.media import decode_pixels, encode_image
from jobs.data.tokenizer import CaptionTokenizer
from jobs.recipe.recipe import Recipe

GOAL_RATIO, GOAL_WAIT = 1.0, 0.02
IMAGE, TOKENS, SLOTS, ROWS, MICRO_BATCHES = 64, 10, 8, 2, 2
"""Captions are all of one length, so that both pack the same number of samples into the same shapes."""
BATCH = SLOTS * ROWS
FILES, ROWS_PER_FILE = 4, 1024
WARM_UP_STEPS, STEPS = 8, 60
CROP, JITTER = 0.15, 0.2
WAIT_SECONDS = 0.2
EXACT, FAST = "reknit, exact order and sums", "reknit, exact order, float32 sums"
PEER = "Ray Train iter_torch_batches"


def write_set(folder: Path) -> int:
    """Writes a curated set of noise with letters below it; returns the tokenizer's vocabulary."""
    tokenizer = CaptionTokenizer(["en"])
    draws = np.random.default_rng(0)
    splits = {
        split: [
            [_drawn(draws, f"{split}{number}-{row}", tokenizer) for row in range(ROWS_PER_FILE)]
            for number in range(files)
        ]
        for split, files in (("train", FILES), ("held_out", 1))
    }
    write_given_set(folder, tokenizer, splits, rows_per_group=128, image_size=IMAGE)
    return tokenizer.vocabulary


def _drawn(draws: np.random.Generator, name: str, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    caption = "".join(chr(97 + int(letter)) for letter in draws.integers(0, 26, TOKENS))
    coarse = draws.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    return {
        "sample": name,
        "item": name,
        "category": "drawn",
        "language": "en",
        "caption": caption,
        "tokens": tokenizer.encode(caption),
        "image": encode_image(coarse.repeat(IMAGE // 8, axis=0).repeat(IMAGE // 8, axis=1)),
        "audio": None,
        "width": IMAGE,
        "height": IMAGE,
    }


def recipe(source: Path, vocabulary: int) -> Recipe:
    """The run that is measured. It would go on for longer than the bench lasts."""
    context = SLOTS * (TOKENS + 1)
    return Recipe.model_validate(
        {
            "run": {"name": "feed", "steps": 100_000, "seed": 1},
            "model": {
                "build": "jobs.models.captioner:build",
                "arguments": {
                    "image_size": IMAGE,
                    "patch": 16,
                    "width": 128,
                    "depth_image": 2,
                    "depth_text": 3,
                    "heads": 4,
                    "vocabulary": vocabulary,
                    "context": context,
                },
            },
            "data": {
                "build": "jobs.data.multimodal:build",
                "arguments": {
                    "source": str(source),
                    "context": context,
                    "slots": SLOTS,
                    "crop": CROP,
                    "jitter": JITTER,
                },
                "feed_workers": 1,
            },
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 10, "clip_norm": 1.0},
            "parallel": {
                "workers": 1,
                "stages": 1,
                "micro_batches": MICRO_BATCHES,
                "micro_batch_size": ROWS,
            },
            "metrics": {"enabled": False},
        }
    )


def _ours(recipe: Recipe, folder: Path, steps: int) -> tuple[float, float]:
    """(samples a second, share of the time spent waiting for data)."""
    with started(recipe, folder) as run:

        def wait_for(reached: int) -> tuple[float, float, int]:
            while not run.feed_processes() or (progress := run.progress(0, 0)).steps_total < reached:
                if run.wait(WAIT_SECONDS):
                    raise RuntimeError(f"the run ended by itself: {run.progress(0, 0).message}")
            last = progress.steps[-1]
            return last.committed_at, run.badput()["data_wait"], sum(each.samples for each in progress.steps)

        began, waited_before, samples_before = wait_for(WARM_UP_STEPS)
        ended, waited, samples = wait_for(WARM_UP_STEPS + steps)
    seconds = ended - began
    return (samples - samples_before) / seconds, (waited - waited_before) / seconds


def prepared(batch: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """``BATCH`` rows of the Parquet files as one micro-batch: what a user of Ray Data writes into
    ``map_batches``, with the same decoder and the same changes to the images."""
    how = Augmentation(CROP, JITTER)
    count, shape = len(batch["image"]), (ROWS, SLOTS)
    image = np.zeros((count, IMAGE, IMAGE, 3), dtype=np.uint8)
    for place, png in enumerate(batch["image"]):
        seed = int.from_bytes(hashlib.blake2b(png, digest_size=4).digest(), "little")
        image[place] = augmented(decode_pixels(png), how, seed, 0, place)
    captions = np.stack([np.asarray(each) for each in batch["tokens"]]).astype(np.int64)
    first, end = np.full((count, 1), 3), np.full((count, 1), CaptionTokenizer.end)
    length = captions.shape[1] + 1
    return {
        "image": image.reshape(1, *shape, IMAGE, IMAGE, 3),
        "has_image": np.ones((1, *shape), dtype=np.uint8),
        "tokens": np.concatenate([first, captions], axis=1).reshape(1, ROWS, SLOTS * length),
        "targets": np.concatenate([captions, end], axis=1).reshape(1, ROWS, SLOTS * length),
        "segment": np.tile(np.arange(SLOTS).repeat(length), (1, ROWS, 1)),
        "position": np.tile(np.tile(np.arange(length), SLOTS), (1, ROWS, 1)),
    }


def _peer_loop(order: dict[str, Any]) -> None:
    """What Ray Train's worker does: ``order["steps"]`` after the warm-up; then it says how long they took."""
    import torch
    from ray import train

    recipe = Recipe.model_validate(order["recipe"])
    torch.set_num_threads(recipe.parallel.threads)
    torch.manual_seed(recipe.run.seed)
    layers, loss = build_layers(recipe.model.build, recipe.model.arguments)
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.learning_rate)

    def batches() -> Iterator[dict[str, Any]]:
        shard = train.get_dataset_shard("train")
        while True:
            yield from shard.iter_torch_batches(batch_size=1, prefetch_batches=8, drop_last=True)

    source, waited, began = batches(), 0.0, 0.0
    for step in range(WARM_UP_STEPS + order["steps"]):
        if step == WARM_UP_STEPS:
            waited, began = 0.0, time.perf_counter()
        counted = 0
        for _ in range(MICRO_BATCHES):
            asked = time.perf_counter()
            row = {name: values[0] for name, values in next(source).items()}
            waited += time.perf_counter() - asked
            targets = row.pop("targets")
            total, count = loss(model(row), targets)
            total.backward()  # type: ignore[no-untyped-call]
            counted += int(count)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= counted
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    Path(order["result"]).write_text(f"{order['steps'] * MICRO_BATCHES * BATCH / seconds} {waited / seconds}")


def _ray_train(recipe: Recipe, folder: Path, steps: int) -> tuple[float, float]:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    files = sorted(str(path) for path in Path(recipe.data.arguments["source"]).glob("train-*.parquet"))
    read: Any = ray.data.read_parquet(files, columns=["tokens", "image"])
    result = folder / "result"
    trainer = TorchTrainer(
        _peer_loop,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "result": str(result),
            "steps": steps,
        },
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="peer", storage_path=str(folder / "storage")),
        datasets={"train": read.map_batches(prepared, batch_size=BATCH)},
    )
    trainer.fit()
    samples, share = result.read_text().split()
    return float(samples), float(share)


def run(console: Console, steps: int = STEPS) -> BenchReport:
    """Measures; takes about four minutes. Raises RuntimeError if a job stops by itself."""
    with tempfile.TemporaryDirectory() as name, connect(None, 1, 1.0, 0.0, more_cpus=1.0):
        folder = Path(name)
        (folder / "set").mkdir()
        console.print("drawing the set", highlight=False)
        measured = recipe(folder / "set", write_set(folder / "set"))
        found: dict[str, tuple[float, float]] = {}
        # twice in turn: whatever the machine does besides meets both
        for turn in (0, 1):
            for number, who in enumerate((EXACT, FAST, PEER)):
                console.print(f"turn {turn + 1}: {who}", highlight=False)
                place = folder / f"run-{turn}-{number}"
                if who == PEER:
                    place.mkdir()
                    each = _ray_train(measured, place, steps)
                else:
                    reduction = "fast" if who == FAST else "exact"
                    each = _ours(measured.model_copy(update={"reduction": reduction}), place, steps)
                before = found.get(who, each)
                found[who] = ((before[0] + each[0]) / 2, (before[1] + each[1]) / 2)
    our_rate, our_wait = found[EXACT]
    ratio = our_rate / found[PEER][0]
    return BenchReport(
        bench="feed",
        headline={
            "ratio_to_ray_train": ratio,
            "ratio_with_float_sums": found[FAST][0] / found[PEER][0],
            "data_wait_share": our_wait,
        },
        goal=f"ratio_to_ray_train >= {GOAL_RATIO:.1f}, data_wait_share <= {GOAL_WAIT}",
        met=ratio >= GOAL_RATIO and our_wait <= GOAL_WAIT,
        rows=tuple(
            {"what": who, "samples_per_second": rate, "data_wait_share": wait}
            for who, (rate, wait) in found.items()
        ),
        notes=(
            f"one worker that trains, one CPU that prepares; {MICRO_BATCHES} micro-batches of {BATCH} images "
            f"({IMAGE} x {IMAGE}) a step, {steps} steps after {WARM_UP_STEPS}, two turns each, their mean",
            "ours shuffles the whole set and deals every sample once an epoch; Ray Train reads the files in "
            "order, without a shuffle; ratio_to_ray_train is with exact sums",
        ),
    )
