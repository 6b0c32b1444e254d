"""Ray Train (2.60, elastic) on a bench's job: data-parallel workers who all restart from a checkpoint.

The loop is the one that Ray's guides to fault tolerance and elasticity show: on every start the workers
load the newest checkpoint, and each step's micro-batches are dealt among however many workers there
are, so every step has the whole batch. Gradients are summed by one all-reduce over a flat buffer. The
driver is a process of its own, as it would be for a user.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from jobs.assembly import data_arguments
from jobs.bench.driver import Driver
from jobs.bench.goodput_trace import Step
from jobs.bench.kills import Commit
from jobs.builders import build_data, build_layers
from jobs.recipe.recipe import Recipe

TUNED: Mapping[str, str] = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
}
"""Ray Train's settings are environment variables of its controller. By default it polls its workers every
2 s, waits ten minutes for one that does not answer, a minute for room that is no longer there, and half a
minute for the dead to leave their process group."""


@dataclass(frozen=True, slots=True)
class Setting:
    """``resize_seconds``: how often Ray Train looks whether more workers fit (its default is 60).
    ``checkpoint_every`` is in steps."""

    min_workers: int
    max_workers: int
    resize_seconds: float = 60.0
    checkpoint_every: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


class RayTrainRun:
    """A driver process that trains until it is closed, on the Ray cluster at ``address``.

    What it needs and writes is in ``folder``. A context manager: at its end the driver is gone, and with it
    the job's actors.
    """

    def __init__(self, recipe: Recipe, setting: Setting, address: str, folder: Path) -> None:
        self._folder = folder
        order = {
            "recipe": recipe.model_dump(mode="json"),
            "address": address,
            "folder": str(folder),
            "min_workers": setting.min_workers,
            "max_workers": setting.max_workers,
            "resize_seconds": setting.resize_seconds,
            "checkpoint_every": setting.checkpoint_every,
            "environment": dict(setting.environment),
        }
        self._driver = Driver("jobs.bench.ray_train_peer", order, folder)

    def __enter__(self) -> RayTrainRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._driver.close()

    def steps(self) -> list[Step]:
        """Every step that was finished, those done twice too."""
        return [step for steps in ray_train_sets(self._folder) for step in steps]

    def commits(self) -> list[Commit]:
        """As ``new_commits``."""
        return new_commits(ray_train_sets(self._folder))

    def workers(self) -> list[int]:
        """Process ids of the newest set of workers, by rank."""
        sets = sorted(self._folder.glob("*.workers"))
        return [int(each) for each in sets[-1].read_text(encoding="utf-8").split()] if sets else []

    def check(self) -> None:
        """Raises RuntimeError if the driver ended by itself."""
        self._driver.check()


def ray_train_sets(folder: Path) -> list[list[Step]]:
    """What rank 0 of each set of workers finished, the oldest set first."""
    found: list[list[Step]] = []
    for path in sorted(folder.glob("*.commits")):
        *whole, _ = path.read_text(encoding="utf-8").split("\n")
        found.append([])
        for number, at, samples, workers in (line.split() for line in whole):
            found[-1].append(Step(int(number), float(at), int(samples), int(workers)))
    return found


def new_commits(sets: Sequence[Sequence[Step]]) -> list[Commit]:
    """The steps that were new: what is only done again brings nobody further. Ascending in time."""
    commits: list[Commit] = []
    newest = 0
    for losses, steps in enumerate(sets):
        commits += [Commit(step.at, losses) for step in steps if step.number > newest]
        newest = max([newest, *(step.number for step in steps)])
    return commits


def _loop(order: dict[str, Any]) -> None:
    """What each of Ray Train's workers does, until it is killed."""
    import os

    import torch
    import torch.distributed as dist
    from ray import train
    from torch import nn

    recipe = Recipe.model_validate(order["recipe"])
    folder = Path(order["folder"])
    torch.set_num_threads(recipe.parallel.threads)
    torch.manual_seed(recipe.run.seed)
    context = train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    layers, loss = build_layers(recipe.model.build, recipe.model.arguments)
    data = build_data(recipe.data.build, data_arguments(recipe))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.learning_rate)
    step = 0
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as path:
            state = torch.load(Path(path) / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    parameters = list(model.parameters())
    gradients = torch.zeros(sum(parameter.numel() for parameter in parameters))
    start = 0
    for parameter in parameters:
        parameter.grad = gradients[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    mine = range(rank, recipe.parallel.micro_batches, ranks)
    batch = recipe.parallel.micro_batches * recipe.parallel.micro_batch_size
    processes: list[int] = [0] * ranks
    dist.all_gather_object(processes, os.getpid())
    name = f"{time.time():.3f}"  # so that sets of workers sort by age
    if rank == 0:
        (folder / f"{name}.workers").write_text(" ".join(str(each) for each in processes), encoding="utf-8")
    log = folder / f"{name}.commits" if rank == 0 else Path(os.devnull)
    with log.open("w", buffering=1, encoding="utf-8") as commits:
        while True:
            step += 1
            gradients.zero_()
            counted = torch.zeros(1)
            for micro_batch in mine:
                inputs, targets = data.micro_batch(step, micro_batch)
                total, count = loss(model(inputs), targets)
                total.backward()  # type: ignore[no-untyped-call]
                counted += count
            dist.all_reduce(gradients)
            dist.all_reduce(counted)
            gradients /= counted
            optimizer.step()
            commits.write(f"{step} {time.time():.6f} {batch} {ranks}\n")
            if step % order["checkpoint_every"]:
                continue
            if rank:
                train.report({"step": step})
                continue
            with TemporaryDirectory() as path:
                state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, Path(path) / "state.pt")
                train.report({"step": step}, checkpoint=train.Checkpoint.from_directory(path))


def _drive(order: dict[str, Any]) -> None:
    """The driver: runs until it is killed, or until Ray Train gives up."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address=order["address"], log_to_driver=False, runtime_env={"env_vars": order["environment"]})
    elastic: dict[str, Any] = {  # ScalingConfig's published type is that of the older, fixed trainer
        "num_workers": (order["min_workers"], order["max_workers"]),
        "elastic_resize_monitor_interval_s": order["resize_seconds"],
    }
    trainer = TorchTrainer(
        _loop,
        train_loop_config=order,
        scaling_config=ScalingConfig(resources_per_worker={"CPU": 1}, **elastic),
        run_config=RunConfig(
            name="peer",
            storage_path=str(Path(order["folder"]) / "storage"),
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The driver of a Ray Train run, started by a bench.")
    parser.add_argument("order", type=Path)
    # the workers import the loop by the module's real name
    from jobs.bench.ray_train_peer import _drive as drive

    drive(json.loads(parser.parse_args().order.read_text(encoding="utf-8")))
