"""Makes the worker of a Ray actor: the engine, the device, and the feed workers that it reads by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import ray
import torch

from actors.fed import fed
from actors.worker import Worker
from runtime.draws import draw_in_vectors
from runtime.fabric.interface import EndpointMaker
from runtime.plan import WorkerId
from strategies.job import Job


def new_worker(
    worker: WorkerId,
    job: Job,
    run: str,
    make_endpoint: EndpointMaker,
    *,
    domain: str,
    controller: WorkerId,
    on_beat: Callable[[], None],
) -> Worker:
    """A worker of ``run``, warmed up, on the device that Ray assigned to this process. Raises ValueError as
    ``Worker`` does."""
    torch.set_num_threads(job.threads)
    draw_in_vectors()
    if job.feed_workers:
        job = replace(job, build_data=partial(fed, job.build_data, run, job.feed_workers))
    make = _worker_class(job)
    return make(
        worker, job, make_endpoint, assigned_device(), domain=domain, controller=controller, on_beat=on_beat
    )


def _worker_class(job: Job) -> type[Worker]:
    if job.engine is None:
        return Worker
    from actors.engines.worker import EngineWorker  # what it needs is not installed everywhere

    return EngineWorker


def assigned_device() -> torch.device:
    """The GPU that Ray assigned to this process (a fraction counts too), else the CPU."""
    if torch.cuda.is_available() and ray.get_gpu_ids():
        torch.cuda.set_device(0)  # Ray shows the process its own GPUs only
        return torch.device("cuda", 0)
    return torch.device("cpu")
