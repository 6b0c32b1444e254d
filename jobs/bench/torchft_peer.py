"""torchft on the recovery bench's job: replicas as processes, killed from outside like Reknit's workers.

A lighthouse, and in each replica torchft's manager, its gloo group and its optimizer wrapper. Gradients
are summed by one all-reduce of the manager over a flat buffer, because torchft's DistributedDataParallel
(0.2.0, gloo) ends survivors by an assertion when a peer dies in mid-step. The dead are not replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch._C._distributed_c10d import TCPStore

# Imported here, not in the functions, so that the server that processes are forked from does it only once.
from torchft.coordination import LighthouseServer
from torchft.manager import Manager
from torchft.optim import OptimizerWrapper
from torchft.process_group import ProcessGroupGloo

from jobs.assembly import build_data, build_layers, data_arguments
from jobs.bench.kills import PATIENCE_SECONDS, Commit, Recovery, recovery
from jobs.recipe import Recipe

MIN_REPLICAS = 2
QUORUM_TICK_MS, HEARTBEAT_TIMEOUT_MS = 100, 5_000
"""torchft's defaults."""

STEPS_BEFORE_KILL = 20
START_SECONDS = 40.0
"""How long replicas may take to come together."""

NICENESS = 15
"""Ray gives it to its workers; with another one, the peer would have more of a busy machine."""
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Setting:
    """``join_timeout_ms`` is the lighthouse's; its default is that of the ``torchft_lighthouse`` command."""

    replicas: int
    join_timeout_ms: int = 60_000


def measure(
    recipe: Recipe, setting: Setting, kills: int, random_: random.Random
) -> Iterator[Recovery | None]:
    """One kill in each of ``kills`` fresh sets of replicas, at a random moment.

    None stands for a kill after which the survivors committed nothing for ``PATIENCE_SECONDS``. Raises
    RuntimeError if the replicas do not come together. No process is left behind.
    """
    for _ in range(kills):
        with TemporaryDirectory(prefix="reknit-torchft-") as folder:
            replicas = _Replicas(recipe, setting, Path(folder))
            try:
                if not replicas.wait(
                    lambda commits: len(_all_together(commits)) >= STEPS_BEFORE_KILL, START_SECONDS
                ):
                    raise RuntimeError(
                        f"the replicas did not train together for {STEPS_BEFORE_KILL} steps "
                        f"within {START_SECONDS:.0f} s"
                    )
                time.sleep(random_.uniform(0.0, 0.5))
                killed_at = replicas.kill(random_.randrange(setting.replicas))
                replicas.wait(lambda commits: commits[-1].losses > 0, PATIENCE_SECONDS)
                result = recovery(replicas.commits(), killed_at)
            finally:
                replicas.close()
        yield result


def _all_together(commits: Sequence[Commit]) -> list[Commit]:
    return [commit for commit in commits if commit.losses == 0]


class _Replicas:
    def __init__(self, recipe: Recipe, setting: Setting, folder: Path) -> None:
        self._folder = folder
        self.killed: list[int] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["jobs.bench.torchft_peer"])
        reader, writer = context.Pipe(duplex=False)
        self._lighthouse = context.Process(target=_serve, args=(setting, writer, folder), daemon=True)
        self._processes: list[Any] = []
        try:
            self._lighthouse.start()
            if not reader.poll(START_SECONDS):
                raise RuntimeError("torchft's lighthouse did not start")
            address: str = reader.recv()
            for number in range(setting.replicas):
                process = context.Process(
                    target=_replica, args=(number, recipe, setting.replicas, address, folder), daemon=True
                )
                process.start()
                self._processes.append(process)
        except BaseException:
            self.close()
            raise

    def commits(self) -> list[Commit]:
        """Those of the living, by the first of them that made each."""
        by_step: dict[int, Commit] = {}
        for replica in range(len(self._processes)):
            log = _commits(self._folder, replica)
            if replica in self.killed or not log.exists():
                continue
            *whole, _ = log.read_text().split("\n")
            for step, at, participants in (line.split() for line in whole):
                commit = Commit(float(at), len(self._processes) - int(participants))
                earlier = by_step.get(int(step))
                if earlier is None or commit.at < earlier.at:
                    by_step[int(step)] = commit
        return sorted(by_step.values(), key=lambda commit: commit.at)

    def wait(self, until: Callable[[Sequence[Commit]], bool], patience: float) -> bool:
        """False after ``patience`` seconds. Raises RuntimeError if a replica ended by itself."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            commits = self.commits()
            if commits and until(commits):
                return True
            for replica, process in enumerate(self._processes):
                if replica not in self.killed and process.exitcode is not None:
                    last = _output(self._folder, f"replica-{replica}").read_text().splitlines()[-1:]
                    raise RuntimeError(f"torchft's replica {replica} ended by itself: {last}")
        return False

    def kill(self, replica: int) -> float:
        """Returns when, in seconds since 1970."""
        process_id = self._processes[replica].pid
        assert process_id is not None
        killed_at = time.time()
        os.kill(process_id, signal.SIGKILL)
        self.killed.append(replica)
        return killed_at

    def close(self) -> None:
        for process in (*self._processes, self._lighthouse):
            if process.pid is not None:
                process.kill()
                process.join()


def _commits(folder: Path, replica: int) -> Path:
    return folder / f"replica-{replica}.commits"


def _output(folder: Path, name: str) -> Path:
    return folder / f"{name}.log"


def _divert_output(folder: Path, name: str) -> None:
    """torchft tells of every quorum on standard error, from its own threads."""
    with _output(folder, name).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _end_with_parent() -> None:
    """However the bench ends, its processes end too."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _serve(setting: Setting, address: Connection, folder: Path) -> None:
    """The lighthouse, until it is killed."""
    _divert_output(folder, "lighthouse")
    _end_with_parent()
    server = LighthouseServer(
        bind="[::]:0",
        min_replicas=MIN_REPLICAS,
        join_timeout_ms=setting.join_timeout_ms,
        quorum_tick_ms=QUORUM_TICK_MS,
        heartbeat_timeout_ms=HEARTBEAT_TIMEOUT_MS,
    )
    address.send(server.address())
    signal.pause()


def _replica(number: int, recipe: Recipe, replicas: int, lighthouse: str, folder: Path) -> None:
    """Trains until it is killed; writes down step, time and number of participants of every commit."""
    _divert_output(folder, f"replica-{number}")
    _end_with_parent()
    os.nice(NICENESS)
    torch.set_num_threads(recipe.parallel.threads)
    torch.manual_seed(recipe.run.seed)
    layers, loss = build_layers(recipe.model.build, recipe.model.arguments)
    data = build_data(recipe.data.build, data_arguments(recipe))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.learning_rate)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=MIN_REPLICAS,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"replica-{number}",
        hostname="127.0.0.1",
    )
    parameters = list(model.parameters())
    gradients = torch.zeros(sum(parameter.numel() for parameter in parameters))
    start = 0
    for parameter in parameters:
        parameter.grad = gradients[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    managed = OptimizerWrapper(manager, optimizer)
    mine = range(number, recipe.parallel.micro_batches, replicas)
    with _commits(folder, number).open("w", buffering=1) as commits:
        while True:
            step = manager.current_step() + 1
            pairs = [data.micro_batch(step, micro_batch) for micro_batch in mine]
            inputs, targets = (torch.cat(each) for each in zip(*pairs, strict=True))
            managed.zero_grad(set_to_none=False)
            total, count = loss(model(inputs), targets)
            (total / count).backward()
            manager.allreduce(gradients).wait()
            managed.step()
            if manager.current_step() == step:
                commits.write(f"{step} {time.time():.6f} {manager.num_participants()}\n")
