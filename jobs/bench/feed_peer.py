"""Ray Train's side of the bench of the feed: one job that trains on each regime's files when told to.

``iter_torch_batches`` reads the files as they come, the easiest it can have. A turn is an iterator of its
own, whose rest is read without training when the turn is over. The warm-up of a turn spares it what the
beginning of an epoch takes.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from actors.cluster import gcs_address
from jobs.bench.driver import Driver
from jobs.bench.feed_set import BATCH, CROP, JITTER, MICRO_BATCHES, ROWS, SLOTS, Regime, Window
from jobs.bench.resident import wait_for
from jobs.builders import build_layers
from jobs.data.augment import Augmentation, augmented
from jobs.data.media import decode_pixels
from jobs.data.tokenizer import CaptionTokenizer
from jobs.recipe.recipe import Recipe

_POLL_SECONDS = 0.05

_BLOCK = 16
"""Micro-batches that Ray Data hands out together: by default as many as make 128 MiB, so that a turn would
be fed from what had been made before it. A turn begins and ends with a block."""


class RayTrainFeed:
    """A driver on the connected Ray whose worker trains on one of ``recipes`` at a time, when it is its turn.

    What it needs and writes is in ``folder``. A context manager: at its end the job is gone.
    """

    def __init__(self, recipes: Mapping[Regime, Recipe], folder: Path) -> None:
        folder.mkdir()
        self._folder, self._turns = folder, 0
        order = {
            "address": gcs_address(),
            "folder": str(folder),
            "recipes": {regime.name: each.model_dump(mode="json") for regime, each in recipes.items()},
            "sizes": {regime.name: regime.image for regime in recipes},
        }
        self._driver = Driver("jobs.bench.feed_peer", order, folder)

    def __enter__(self) -> RayTrainFeed:
        self._await(_place(self._folder, "ready"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._driver.close()

    def take(self, regime: Regime) -> Window:
        """Lets it train for a turn. Raises RuntimeError if it ended by itself."""
        order = {"regime": regime.name, "warm_up": regime.warm_up, "steps": regime.steps}
        _write(_place(self._folder, f"order-{self._turns}"), order)
        answer = _place(self._folder, f"answer-{self._turns}")
        self._await(answer)
        self._turns += 1
        return Window(**json.loads(answer.read_text(encoding="utf-8")))

    def _await(self, path: Path) -> None:
        def there() -> bool:
            self._driver.check()
            return path.exists()

        wait_for(f"{path.name} of Ray Train", there, _POLL_SECONDS)


def _place(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all: somebody waits for it."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content), encoding="utf-8")
    beside.rename(path)


def prepared(batch: Mapping[str, np.ndarray[Any, Any]], size: int) -> dict[str, np.ndarray[Any, Any]]:
    """``BATCH`` rows of the Parquet files as one micro-batch: what a user of Ray Data writes into
    ``map_batches``, with the same decoder and the same changes to the images."""
    how = Augmentation(CROP, JITTER)
    count, shape = len(batch["image"]), (ROWS, SLOTS)
    image = np.zeros((count, size, size, 3), dtype=np.uint8)
    for place, png in enumerate(batch["image"]):
        seed = int.from_bytes(hashlib.blake2b(png, digest_size=4).digest(), "little")
        image[place] = augmented(decode_pixels(png), how, seed, 0, place)
    captions = np.stack([np.asarray(each) for each in batch["tokens"]]).astype(np.int64)
    first, end = np.full((count, 1), 3), np.full((count, 1), CaptionTokenizer.end)
    length = captions.shape[1] + 1
    return {
        "image": image.reshape(1, *shape, size, size, 3),
        "has_image": np.ones((1, *shape), dtype=np.uint8),
        "tokens": np.concatenate([first, captions], axis=1).reshape(1, ROWS, SLOTS * length),
        "targets": np.concatenate([captions, end], axis=1).reshape(1, ROWS, SLOTS * length),
        "segment": np.tile(np.arange(SLOTS).repeat(length), (1, ROWS, 1)),
        "position": np.tile(np.tile(np.arange(length), SLOTS), (1, ROWS, 1)),
    }


class Trainer:
    """What Ray Train's worker trains in one regime: a plain loop of PyTorch."""

    def __init__(self, recipe: Recipe) -> None:
        import torch

        torch.manual_seed(recipe.run.seed)
        layers, self._loss = build_layers(recipe.model.build, recipe.model.arguments)
        self.model = torch.nn.Sequential(*layers)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.optimizer.learning_rate)

    def window(self, source: Iterator[dict[str, Any]], warm_up: int, steps: int) -> Window:
        waited, began = 0.0, 0.0
        for step in range(warm_up + steps):
            if step == warm_up:
                waited, began = 0.0, time.perf_counter()
            waited += self._step(source)
        seconds = time.perf_counter() - began
        return Window(steps * MICRO_BATCHES * BATCH / seconds, waited / seconds)

    def _step(self, source: Iterator[dict[str, Any]]) -> float:
        """The seconds of it that were spent waiting for data."""
        import torch

        counted, waited = 0, 0.0
        for _ in range(MICRO_BATCHES):
            asked = time.perf_counter()
            row = {name: values[0] for name, values in next(source).items()}
            waited += time.perf_counter() - asked
            targets = row.pop("targets")
            total, count = self._loss(self.model(row), targets)
            total.backward()  # type: ignore[no-untyped-call]
            counted += int(count)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= counted
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return waited


def _loop(order: dict[str, Any]) -> None:
    """What Ray Train's worker does, until it is killed: turn after turn as it is told."""
    import torch
    from ray import train

    recipes = {name: Recipe.model_validate(each) for name, each in order["recipes"].items()}
    torch.set_num_threads(max(recipe.parallel.threads for recipe in recipes.values()))
    trainers = {name: Trainer(recipe) for name, recipe in recipes.items()}
    folder = Path(order["folder"])
    _write(_place(folder, "ready"), {})
    for turn in itertools.count():
        path = _place(folder, f"order-{turn}")
        while not path.exists():
            time.sleep(_POLL_SECONDS)
        told = json.loads(path.read_text(encoding="utf-8"))
        shard = train.get_dataset_shard(told["regime"])
        batches: Any = iter(shard.iter_torch_batches(batch_size=1, prefetch_batches=8, drop_last=True))
        window = trainers[told["regime"]].window(batches, told["warm_up"], told["steps"])
        for _ in batches:
            pass  # an execution that comes to its end by itself has no worker ended, and none started anew
        _write(_place(folder, f"answer-{turn}"), asdict(window))


def _files(recipe: Recipe) -> list[str]:
    return sorted(str(path) for path in Path(recipe.data.arguments["source"]).glob("train-*.parquet"))


def _drive(order: dict[str, Any]) -> None:
    """The driver: runs until it is killed, or until Ray Train gives up."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address=order["address"], log_to_driver=False)
    datasets: dict[str, Any] = {}
    for name, content in order["recipes"].items():
        recipe = Recipe.model_validate(content)
        image_bytes = BATCH * order["sizes"][name] ** 2 * 3
        ray.data.DataContext.get_current().target_max_block_size = (2 * _BLOCK - 1) * image_bytes // 2
        read: Any = ray.data.read_parquet(_files(recipe), columns=["tokens", "image"])
        size = {"size": order["sizes"][name]}
        datasets[name] = read.map_batches(prepared, batch_size=BATCH, fn_kwargs=size)
    trainer = TorchTrainer(
        _loop,
        train_loop_config=order,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="peer", storage_path=str(Path(order["folder"]) / "storage")),
        datasets=datasets,
    )
    trainer.fit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The driver of a Ray Train job, started by a bench.")
    parser.add_argument("order", type=Path)
    # the workers import the loop by the module's real name
    from jobs.bench.feed_peer import _drive as drive

    drive(json.loads(parser.parse_args().order.read_text(encoding="utf-8")))
