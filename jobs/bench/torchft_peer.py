"""torchft on a bench's job: replicas as processes, killed from outside like Reknit's workers.

A lighthouse, and in each replica torchft's manager, its gloo group and its optimizer wrapper. Gradients
are summed by one all-reduce of the manager over a flat buffer, because torchft's DistributedDataParallel
(0.2.0, gloo) ends survivors by an assertion when a peer dies in mid-step.
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
from datetime import timedelta
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

from jobs.assembly import data_arguments
from jobs.bench.goodput_trace import Step
from jobs.bench.kills import PATIENCE_SECONDS, Commit, Recovery, recovery
from jobs.builders import build_data, build_layers
from jobs.recipe.recipe import Recipe

MIN_REPLICAS = 2
QUORUM_TICK_MS = 100
"""torchft's default."""

STEPS_BEFORE_KILL = 20
START_SECONDS = 40.0
"""How long replicas may take to come together."""

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Setting:
    """``join_timeout_ms`` and ``heartbeat_timeout_ms`` are the lighthouse's, ``timeout_seconds`` and
    what follows up to ``quorum_retries`` the manager's; the defaults are torchft's own (those of the
    ``torchft_lighthouse`` command).

    ``whole_batch``: each step's micro-batches are dealt anew among those who take part in it, which torchft
    leaves to the training loop; else each replica computes the same share of them whoever is there, and
    steps get smaller. ``one_by_one``: gradients are accumulated over micro-batches, else they are
    computed in one batch. ``whole_batch`` needs ``one_by_one``.
    """

    replicas: int
    join_timeout_ms: int = 60_000
    heartbeat_timeout_ms: int = 5_000
    timeout_seconds: float = 60.0
    quorum_timeout_seconds: float = 60.0
    quorum_retries: int = 0
    whole_batch: bool = False
    one_by_one: bool = False


TUNED_TIMEOUTS: Any = {"join_timeout_ms": 1000, "heartbeat_timeout_ms": 1000, "timeout_seconds": 5.0}
"""For steps of half a second: replicas whose steps are out of phase must be waited for longer than a step,
else they never train together; the dead are waited for until their heartbeats are missed."""


def measure(
    recipe: Recipe, setting: Setting, kills: int, random_: random.Random
) -> Iterator[Recovery | None]:
    """One kill in each of ``kills`` fresh sets of replicas, at a random moment.

    None stands for a kill after which the survivors committed nothing for ``PATIENCE_SECONDS``. Raises
    RuntimeError if the replicas do not come together. No process is left behind.
    """
    for _ in range(kills):
        with TemporaryDirectory(prefix="reknit-torchft-") as folder:
            replicas = Replicas(recipe, setting, Path(folder))
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


class Replicas:
    """A lighthouse and its replicas, on whom kills and newcomers are tried.

    Raises RuntimeError if the lighthouse does not start. ``close`` ends all processes.
    """

    def __init__(self, recipe: Recipe, setting: Setting, folder: Path) -> None:
        self._folder, self._recipe, self._setting = folder, recipe, setting
        self.killed: list[int] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["jobs.bench.torchft_peer"])
        self._context = context
        self._processes: list[Any] = []
        self._lighthouse: Any = None
        try:
            self._address = self._start_lighthouse(port=0)
            for number in range(setting.replicas):
                self._processes.append(self._start(context, number, number))
        except BaseException:
            self.close()
            raise

    def _start_lighthouse(self, port: int) -> str:
        reader, writer = self._context.Pipe(duplex=False)
        arguments = (self._setting, port, writer, self._folder)
        self._lighthouse = self._context.Process(target=_serve, args=arguments, daemon=True)
        self._lighthouse.start()
        if not reader.poll(START_SECONDS):
            raise RuntimeError("torchft's lighthouse did not start")
        address: str = reader.recv()
        return address

    def _start(self, context: Any, number: int, log: int) -> Any:
        arguments = (number, log, self._recipe, self._setting, self._address, self._folder)
        process = context.Process(target=_replica, args=arguments, daemon=True)
        process.start()
        return process

    def add(self, number: int) -> int:
        """Starts a newcomer in the place of replica ``number``: a fresh interpreter that imports all it
        needs, as on a machine that has just come. Returns what ``kill`` knows it by."""
        context = multiprocessing.get_context("spawn")
        replica = len(self._processes)
        self._processes.append(self._start(context, number, replica))
        return replica

    def steps(self) -> list[Step]:
        """Every commit of every replica, the killed ones' too."""
        found = []
        for replica in range(len(self._processes)):
            for step, at, participants, samples in self._log(replica):
                found.append(Step(int(step), float(at), int(samples), int(participants)))
        return found

    def _log(self, replica: int) -> list[list[str]]:
        """The whole lines of a replica's log."""
        log = _commits(self._folder, replica)
        if not log.exists():
            return []
        *whole, _ = log.read_text().split("\n")
        return [line.split() for line in whole]

    def commits(self) -> list[Commit]:
        """Those of the living, by the first of them that made each."""
        by_step: dict[int, Commit] = {}
        for replica in range(len(self._processes)):
            if replica in self.killed:
                continue
            for step, at, participants, _ in self._log(replica):
                commit = Commit(float(at), self._setting.replicas - int(participants))
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
            self.check()
        return False

    def check(self) -> None:
        """Raises RuntimeError if a replica ended by itself."""
        for replica, process in enumerate(self._processes):
            if replica not in self.killed and process.exitcode is not None:
                last = _output(self._folder, f"replica-{replica}").read_text().splitlines()[-1:]
                raise RuntimeError(f"torchft's replica {replica} ended by itself: {last}")

    def kill(self, replica: int, number: signal.Signals = signal.SIGKILL) -> float:
        """Returns when, in seconds since 1970. Raises RuntimeError if a replica ended by itself."""
        self.check()
        process_id = self._processes[replica].pid
        assert process_id is not None
        killed_at = time.time()
        os.kill(process_id, number)
        self.killed.append(replica)
        return killed_at

    def replace_lighthouse(self) -> float:
        """Kills the lighthouse and at once starts another one at its address, as a supervisor would;
        returns when it was killed, in seconds since 1970."""
        killed_at = time.time()
        os.kill(self._lighthouse.pid, signal.SIGKILL)
        self._lighthouse.join()
        self._start_lighthouse(int(self._address.rpartition(":")[2]))
        return killed_at

    def close(self) -> None:
        for process in (*self._processes, self._lighthouse):
            if process is not None and process.pid is not None:
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


def _serve(setting: Setting, port: int, address: Connection, folder: Path) -> None:
    """The lighthouse, until it is killed. ``port`` 0 takes any free one."""
    _divert_output(folder, "lighthouse")
    _end_with_parent()
    server = LighthouseServer(
        bind=f"[::]:{port}",
        min_replicas=MIN_REPLICAS,
        join_timeout_ms=setting.join_timeout_ms,
        quorum_tick_ms=QUORUM_TICK_MS,
        heartbeat_timeout_ms=setting.heartbeat_timeout_ms,
    )
    address.send(server.address())
    signal.pause()


def _replica(number: int, log: int, recipe: Recipe, setting: Setting, lighthouse: str, folder: Path) -> None:
    """Trains until it is killed; writes down step, time, participants and samples of every commit."""
    _divert_output(folder, f"replica-{log}")
    _end_with_parent()
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
        pg=ProcessGroupGloo(timedelta(seconds=setting.timeout_seconds)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=MIN_REPLICAS,
        timeout=timedelta(seconds=setting.timeout_seconds),
        quorum_timeout=timedelta(seconds=setting.quorum_timeout_seconds),
        quorum_retries=setting.quorum_retries,
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
    micro_batches, size = recipe.parallel.micro_batches, recipe.parallel.micro_batch_size
    with _commits(folder, log).open("w", buffering=1) as commits:
        while True:
            step = manager.current_step() + 1
            managed.zero_grad(set_to_none=False)
            if setting.whole_batch:
                # Waits for the quorum. Who has yet to fetch the state has no rank and computes nothing.
                rank, ranks = manager.participating_rank(), manager.num_participants()
                mine = range(micro_batches if rank is None else rank, micro_batches, ranks)
                step = manager.current_step() + 1
            else:
                mine = range(number, micro_batches, setting.replicas)
            pairs = [data.micro_batch(step, micro_batch) for micro_batch in mine]
            if not setting.one_by_one:
                inputs, targets = (torch.cat(each) for each in zip(*pairs, strict=True))
                pairs = [(inputs, targets)]
            counted = 0
            for inputs, targets in pairs:
                total, count = loss(model(inputs), targets)
                total.backward()  # type: ignore[no-untyped-call]
                counted += count
            if counted:
                gradients.div_(counted)
            if setting.whole_batch:
                # the manager takes the mean over replicas, whose shares of the batch may be unequal
                gradients.mul_(manager.num_participants() * len(mine) / micro_batches)
            manager.allreduce(gradients).wait()
            managed.step()
            if manager.current_step() == step:
                participants = manager.num_participants()
                samples = size * (micro_batches if setting.whole_batch else participants * len(mine))
                commits.write(f"{step} {time.time():.6f} {participants} {samples}\n")
