"""The peer of the overhead bench: torch.distributed.pipelining and data parallelism, nothing else.

Per replica a 1F1B pipeline (``Schedule1F1B``), over the replicas one flat all-reduce of a stage's gradients,
then clipping by the global norm and fused AdamW on every replica. gloo, no fault tolerance of any
kind. Gradients accumulate in place in one flat tensor, so nothing is copied before the all-reduce.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.exact import clip_coefficient
from strategies.job import Job
from strategies.options import OptimizerSettings


@dataclass(frozen=True, slots=True)
class PeerLayout:
    """``bounds[k]`` to ``bounds[k+1]`` - 1 are stage k's layers; every stage is held by ``replicas``."""

    bounds: tuple[int, ...]
    replicas: int

    @property
    def stages(self) -> int:
        return len(self.bounds) - 1

    @property
    def processes(self) -> int:
        return self.stages * self.replicas

    def place(self, rank: int) -> tuple[int, int]:
        """(stage, replica) of a rank."""
        return rank // self.replicas, rank % self.replicas

    def replica(self, replica: int) -> list[int]:
        """The ranks of one pipeline, first stage first."""
        return [stage * self.replicas + replica for stage in range(self.stages)]

    def group(self, stage: int) -> list[int]:
        """The ranks that hold ``stage``."""
        return list(range(stage * self.replicas, (stage + 1) * self.replicas))

    def micro_batches(self, replica: int, total: int) -> range:
        """Those that ``replica`` computes; 1F1B needs as many for every replica."""
        if total % self.replicas:
            raise ValueError(f"{total} micro-batches do not divide by {self.replicas} replicas")
        return range(replica, total, self.replicas)


def flat_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Zeros (float32, N) of which every parameter's ``grad`` becomes a view."""
    flat_N = torch.zeros(sum(parameter.numel() for parameter in parameters))
    start = 0
    for parameter in parameters:
        parameter.grad = flat_N[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return flat_N


def _optimizer(parameters: Sequence[nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=settings.rate(1),
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


class _Replica:
    """One process: a stage of one replica."""

    def __init__(self, rank: int, layout: PeerLayout, job: Job) -> None:
        # Imports torch's compiler, which takes seconds: only where a peer runs
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        self.job, self.layout = job, layout
        self.stage, self.replica = layout.place(rank)
        pipelines = [dist.new_group(layout.replica(r)) for r in range(layout.replicas)]
        groups = [dist.new_group(layout.group(k)) for k in range(layout.stages)]
        self.pipeline_group, self.stage_group = pipelines[self.replica], groups[self.stage]
        torch.manual_seed(job.seed)
        layers, self.loss = job.build_model()
        module = nn.Sequential(*layers[layout.bounds[self.stage] : layout.bounds[self.stage + 1]])
        torch.manual_seed(job.seed + 1 + rank)  # dropout of its own in every process
        self.data = job.build_data()
        self.mine = layout.micro_batches(self.replica, job.micro_batches)
        self.parameters = list(module.parameters())
        self.gradients_N = flat_gradients(self.parameters)
        self.optimizer = _optimizer(self.parameters, job.optimizer)
        self._count = 0
        self.schedule = Schedule1F1B(
            PipelineStage(module, self.stage, layout.stages, torch.device("cpu"), group=self.pipeline_group),
            n_microbatches=len(self.mine),
            loss_fn=self._loss,
            scale_grads=False,
        )

    def _loss(self, output: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor
        loss, count = self.loss(output, targets)
        self._count += int(count)
        return loss

    def step(self, step: int) -> tuple[float, float]:
        """(mean loss, gradient norm) of the global batch."""
        self.gradients_N.zero_()
        self._count = 0
        losses: list[Tensor] = []
        inputs, targets = zip(*(self.data.micro_batch(step, m) for m in self.mine), strict=True)
        first, last = self.stage == 0, self.stage == self.layout.stages - 1
        self.schedule.step(
            *([torch.cat(inputs)] if first else []),
            target=torch.cat(targets) if last else None,
            losses=losses if last else None,
        )
        summed = torch.tensor([sum(float(loss.detach()) for loss in losses), float(self._count), 0.0])
        dist.all_reduce(self.gradients_N, group=self.stage_group)
        if self.replica == 0:
            summed[2] = self.gradients_N.square().sum()
        dist.all_reduce(summed)
        loss, count, squared = summed.tolist()
        norm = squared**0.5 / count
        clip = self.job.optimizer.clip_norm
        self.gradients_N.mul_((clip_coefficient(norm, clip) if clip is not None else 1.0) / count)
        for group in self.optimizer.param_groups:
            group["lr"] = self.job.optimizer.rate(step)
        self.optimizer.step()
        return loss / count, norm


def _train(rank: int, layout: PeerLayout, job: Job, niceness: int, port: int, reports: Connection) -> None:
    os.nice(max(0, niceness - os.getpriority(os.PRIO_PROCESS, 0)))  # before any other thread begins
    torch.set_num_threads(job.threads)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=layout.processes
    )
    replica = _Replica(rank, layout, job)
    for step in range(1, job.steps + 1):
        loss, _ = replica.step(step)
        if rank == 0:
            reports.send((step, time.time(), loss))


class PipeliningPeer:
    """The peer's processes. A context manager: none is left at its end.

    ``niceness`` is theirs: Ray's workers are nicer than other processes, which must not tell here.
    """

    def __init__(self, layout: PeerLayout, job: Job, niceness: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._receiver, sender = context.Pipe(duplex=False)
        self._processes = [
            context.Process(target=_train, args=(rank, layout, job, niceness, port, sender), daemon=True)
            for rank in range(layout.processes)
        ]
        self.commits: list[float] = []
        """``time.time()`` of every step's end."""
        self.losses: list[float] = []

    def __enter__(self) -> PipeliningPeer:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def processes(self) -> Mapping[int, int]:
        """Process id by rank."""
        return {rank: process.pid or 0 for rank, process in enumerate(self._processes)}

    def poll(self, seconds: float) -> list[float]:
        """Takes in reports for up to ``seconds``; all commits so far. Raises RuntimeError if it died."""
        deadline = time.monotonic() + seconds
        while self._receiver.poll(max(0.0, deadline - time.monotonic())):
            _, committed_at, loss = self._receiver.recv()
            self.commits.append(committed_at)
            self.losses.append(loss)
        if any(process.exitcode for process in self._processes):
            raise RuntimeError("a process of the pipelining peer died; its own output says why")
        return self.commits
