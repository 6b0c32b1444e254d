"""How long a group takes to lose a member: a Reknit group is edited, a gloo group is rebuilt.

The same processes do both, one after the other, on one machine, started by the same signal. Measured
from just before the signal leaves until the last remaining member has finished its first small
all-reduce in the smaller group. gloo is treated kindly: its store outlives the change, and no member
hangs in a collective with the lost one (which it would leave only at its timeout, 30 minutes by
default). Reknit's members are interrupted out of a blocking receive, as they would be.

    python -m jobs.bench.fabric
"""

from __future__ import annotations

import multiprocessing
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from torch._C._distributed_c10d import PrefixStore, TCPStore

from jobs.bench.report import BenchReport
from runtime.fabric.collectives import all_reduce
from runtime.fabric.interface import CONTROL, Interrupted, Message, Tag
from runtime.fabric.sockets import SocketEndpoint
from runtime.plan import CONTROLLER, WorkerId

HEADLINE = "ratio_at_32"
GOAL = 82.0
"""ElasWave (2025) edits communicators 82 times faster than a full rebuild on 96 accelerators."""

_SECONDS = 120.0  # until a member that does not answer fails the run
_ELEMENTS = 16
Kind = Literal["reknit", "gloo"]


class _Gloo:
    """A process group that can only be changed by making another one."""

    def __init__(self, worker: WorkerId, port: int) -> None:
        self._worker = worker
        self._store = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=_SECONDS))

    def all_reduce(self, generation: int, group: Sequence[WorkerId], tensor: torch.Tensor) -> float:
        """Rebuilds the group and sums over it; returns the seconds spent on taking down the old."""
        start = time.perf_counter()
        self.close()
        closed = time.perf_counter()
        dist.init_process_group(
            "gloo",
            store=PrefixStore(str(generation), self._store),
            rank=group.index(self._worker),
            world_size=len(group),
            timeout=timedelta(seconds=_SECONDS),
        )
        dist.all_reduce(tensor)
        return closed - start

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _member(worker: WorkerId, secret: bytes, controller: str, store_port: int) -> None:
    """One process: waits, and on each interrupt sums over the group that came with it."""
    torch.set_num_threads(1)
    commands: dict[int, tuple[Kind, tuple[WorkerId, ...]]] = {}
    done = False

    def obey(message: Message) -> None:
        nonlocal done
        match message.note:
            case ("addresses", addresses):
                endpoint.connect(addresses)
            case ("edit", generation, kind, group):
                commands[generation] = kind, group
                endpoint.interrupt(generation)
            case ("stop", generation):
                done = True
                endpoint.interrupt(generation)

    # Without its controller a member has nothing left to do, and must not stay behind.
    endpoint = SocketEndpoint(worker, secret, on_control=obey, on_lost=lambda peer, _: leave(peer))

    def leave(peer: WorkerId) -> None:
        if peer == CONTROLLER:
            endpoint.close()

    endpoint.connect({CONTROLLER: controller})
    gloo = _Gloo(worker, store_port)
    endpoint.send(CONTROLLER, Tag(0, 0, 0, CONTROL), note=endpoint.address)
    generation = 0
    while not done:
        with suppress(Interrupted):
            endpoint.receive(CONTROLLER, Tag(generation, 0, 0, "what a lost member would have sent"))
        generation = endpoint.acknowledge()
        if done:
            break
        kind, group = commands.pop(generation)
        total, taken_down = torch.full((_ELEMENTS,), float(worker)), 0.0
        if kind == "reknit":
            all_reduce(endpoint, group, Tag(generation, 0, 0, "sum"), total)
        else:
            taken_down = gloo.all_reduce(generation, group, total)
        finish = time.perf_counter()  # CLOCK_MONOTONIC: one clock for all processes of a machine
        assert total.tolist() == [float(sum(group))] * _ELEMENTS
        endpoint.send(CONTROLLER, Tag(0, 0, 0, CONTROL), note=(generation, finish, taken_down))
    gloo.close()
    endpoint.close()


class _Crowd:
    """Member processes and their controller."""

    def __init__(self, size: int) -> None:
        self.group = tuple(range(size))
        self._generation = 0
        self._reports: dict[WorkerId, Any] = {}
        self._awaited: Sequence[WorkerId] = self.group
        self._all_there = threading.Event()
        secret = secrets.token_bytes(32)
        self._endpoint = SocketEndpoint(
            CONTROLLER,
            secret,
            on_control=lambda message: self._report(message.sender, message.note),
            on_lost=lambda peer, reason: self._report(peer, RuntimeError(reason)),
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        # What is slow to import is imported once for all of them.
        context.set_forkserver_preload(["torch.distributed", "runtime.fabric.sockets"])
        self._processes = [
            context.Process(target=_member, args=(w, secret, self._endpoint.address, port), daemon=True)
            for w in self.group
        ]
        for process in self._processes:
            process.start()
        addresses = self._collect()
        self._endpoint.connect(addresses)
        for worker in self.group:
            self._endpoint.send(worker, Tag(0, 0, 0, CONTROL), note=("addresses", addresses))

    def change(self, kind: Kind, group: Sequence[WorkerId]) -> tuple[float, float]:
        """Has ``group`` become the group. Returns the seconds that it took, and how many of them the
        slowest member spent on taking down what it had."""
        self._generation += 1
        self._awaited = group
        command = ("edit", self._generation, kind, tuple(group))
        start = time.perf_counter()
        for worker in group:
            self._endpoint.send(worker, Tag(0, 0, 0, CONTROL), note=command)
        reports = self._collect().values()
        assert all(generation == self._generation for generation, _, _ in reports)
        return max(finish for _, finish, _ in reports) - start, max(down for _, _, down in reports)

    def _report(self, worker: WorkerId, report: Any) -> None:
        """Runs where the endpoint reads. The last report alone wakes who collects them: that the first
        ones come while the last members are still at work must not hold these up."""
        self._reports[worker] = report
        if len(self._reports) == len(self._awaited) or isinstance(report, RuntimeError):
            self._all_there.set()

    def _collect(self) -> dict[WorkerId, Any]:
        in_time = self._all_there.wait(_SECONDS)
        self._all_there.clear()
        reports, self._reports = self._reports, {}
        for worker, report in reports.items():
            if isinstance(report, RuntimeError):
                raise RuntimeError(f"member {worker} {report}; its own output says why")
        if not in_time:
            missing = sorted(set(self._awaited) - set(reports))
            raise RuntimeError(f"members {missing} did not answer in {_SECONDS:.0f} s")
        return reports

    def close(self) -> None:
        for worker in self.group:
            self._endpoint.send(worker, Tag(0, 0, 0, CONTROL), note=("stop", self._generation + 1))
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
        self._endpoint.close()


def measure(sizes: Sequence[int] = (8, 16, 32), repeats: int = 9) -> list[dict[str, float]]:
    """One row per size of the group; all times in seconds, medians unless they say otherwise.

    Every repeat drops another member, the one that collectives pass through among them, and takes it
    back (not timed) before the next. gloo comes last, so that its idle threads disturb nobody; edits are
    repeated four times as often, because they are over so soon.
    """
    rows = []
    for size in sizes:
        crowd = _Crowd(size)
        try:
            edits = _changes(crowd, "reknit", 4 * repeats)
            rebuilds = _changes(crowd, "gloo", repeats)
        finally:
            crowd.close()
        edit, rebuild = median(t for t, _ in edits), median(t for t, _ in rebuilds)
        rows.append(
            {
                "members": size,
                "reknit_seconds": edit,
                "reknit_worst_seconds": max(t for t, _ in edits),
                "gloo_seconds": rebuild,
                "gloo_best_seconds": min(t for t, _ in rebuilds),
                "gloo_taking_down_seconds": median(down for _, down in rebuilds),
                "ratio": rebuild / edit,
            }
        )
    return rows


def _changes(crowd: _Crowd, kind: Kind, repeats: int) -> list[tuple[float, float]]:
    times = []
    for repeat in range(repeats):
        dropped = repeat * len(crowd.group) // repeats
        crowd.change(kind, crowd.group)
        times.append(crowd.change(kind, [worker for worker in crowd.group if worker != dropped]))
    return times


def run(console: Console) -> BenchReport:
    """Measures groups of 8, 16 and 32; about a minute."""
    rows = measure()
    ratio = next(row["ratio"] for row in rows if row["members"] == 32)
    return BenchReport(
        bench="fabric",
        headline={HEADLINE: ratio},
        goal=f"editing a group of 32 at least {GOAL:.0f} times as fast as rebuilding a gloo group",
        met=ratio >= GOAL,
        rows=tuple(rows),
        notes=(
            "gloo's figure includes taking the old group down, as a rebuild does; the column says how much",
        ),
    )
