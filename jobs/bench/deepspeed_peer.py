"""DeepSpeed as its users run it: a fixed group that restarts from its newest checkpoint when a rank is lost.

A launcher starts one process a rank. When one ends, it ends the others and starts all anew, as DeepSpeed's
own and torchrun do; a ZeRO checkpoint can only be loaded by as many ranks as wrote it, so that the lost one's
place is taken again. The launcher looks every few milliseconds and is otherwise free, which is in the peer's
favour.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from torch._C._distributed_c10d import TCPStore

from jobs.assembly import data_arguments
from jobs.bench.kills import Commit
from jobs.builders import build_data, build_layers
from jobs.recipe.recipe import Recipe

POLL_SECONDS = 0.005


class RestartingRun:
    """A group of processes in ``folder`` that is restarted by ``tend``; ``niceness`` is theirs. A context
    manager. Checkpoints are written as often as the recipe says."""

    def __init__(self, recipe: Recipe, folder: Path, niceness: int = 0) -> None:
        self._recipe, self._folder, self._niceness = recipe, folder, niceness
        self.starts = 0
        self.ranks: list[subprocess.Popen[bytes]] = []
        (folder / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json")), encoding="utf-8")

    def __enter__(self) -> RestartingRun:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _start(self) -> None:
        # Held here, as torchrun does: a port that a rank were to open could be another's by then.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        log = (self._folder / f"{self.starts}.log").open("wb")
        for rank in range(self._recipe.parallel.workers):
            command = ["nice", "-n", str(self._niceness)]
            command += [sys.executable, "-m", "jobs.bench.deepspeed_peer", str(self._folder)]
            command += [str(rank), str(self._store.port), str(self.starts)]
            root = Path(__file__).parents[2]
            self.ranks.append(subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT))
        log.close()
        self.starts += 1

    def _end(self) -> None:
        for process in self.ranks:
            process.send_signal(signal.SIGKILL)
        for process in self.ranks:
            process.wait()
        self.ranks.clear()

    def tend(self) -> None:
        """Restarts the group if a rank has ended."""
        if any(process.poll() is not None for process in self.ranks):
            self._end()
            self._start()

    def wait_for(self, steps: int, start: int, seconds: float) -> None:
        """Tends the group until its start number ``start`` has made so many steps. Raises RuntimeError if it
        does not in time or ends by itself, with the last line of its log."""
        deadline = time.monotonic() + seconds
        while sum(commit.losses == start for commit in self.commits()) < steps:
            self.tend()
            if time.monotonic() > deadline or self.starts > start + 1:
                said = (self._folder / f"{start}.log").read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(f"DeepSpeed made too few steps: {said.splitlines()[-1:]}")
            time.sleep(POLL_SECONDS)

    def commits(self) -> list[Commit]:
        """Every step of rank 0, those done again too; ``losses`` counts the restarts."""
        found = []
        for start in range(self.starts):
            path = self._folder / f"{start}.commits"
            if path.exists():
                *whole, _ = path.read_text(encoding="utf-8").split("\n")
                found += [Commit(float(at), start) for at in whole]
        return found


def train(folder: Path, rank: int, port: int, start: int) -> None:
    """One rank, until it is killed."""
    import deepspeed
    import torch
    from torch import nn

    from actors.engines.group import prepare_deepspeed
    from jobs.deepspeed_config import engine_settings
    from runtime.settings import be_local_rank

    recipe = Recipe.model_validate(json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
    settings = engine_settings(recipe)
    assert settings is not None
    parallel = recipe.parallel
    torch.set_num_threads(parallel.threads)
    torch.manual_seed(recipe.run.seed)
    prepare_deepspeed()  # else it would compile an op that nobody here uses, for a minute
    be_local_rank(0)
    torch.distributed.init_process_group(
        "gloo",
        store=TCPStore("127.0.0.1", port, is_master=False),
        rank=rank,
        world_size=parallel.workers,
    )
    layers, loss = build_layers(recipe.model.build, recipe.model.arguments)
    data = build_data(recipe.data.build, data_arguments(recipe))
    model = nn.Sequential(*layers)
    passes = parallel.micro_batches // parallel.workers
    config: dict[str, Any] = {
        **json.loads(settings.config),
        "steps_per_print": 1 << 60,
        "train_micro_batch_size_per_gpu": parallel.micro_batch_size,
        "gradient_accumulation_steps": passes,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.learning_rate)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    saved = folder / "saved"
    if (saved / "latest").exists():
        engine.load_checkpoint(str(saved))
    with (folder / f"{start}.commits").open("w", buffering=1, encoding="utf-8") as commits:
        while True:
            step = engine.global_steps + 1
            for place in range(passes):
                inputs, targets = data.micro_batch(step, rank + place * parallel.workers)
                total, count = loss(engine(inputs), targets)
                engine.backward(total / count)
                engine.step()
            if rank == 0:
                commits.write(f"{time.time():.6f}\n")
            if recipe.checkpoint.every and step % recipe.checkpoint.every == 0:
                engine.save_checkpoint(str(saved), tag=f"step{step}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One rank of a DeepSpeed job, started by a bench.")
    parser.add_argument("folder", type=Path)
    for name in ("rank", "port", "start"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    train(given.folder, given.rank, given.port, given.start)
