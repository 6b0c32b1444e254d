"""The torch.distributed world of one generation, which survivors can leave at once.

A collective cannot be interrupted: who waits for a dead peer's neighbour waits until the group's time limit.
So whoever hears of a loss breaks the group from another thread (NCCL's ``abort``; gloo's connections are
cut); the calls that wait in it raise, and the next generation forms a group of its own.
"""

from __future__ import annotations

import datetime
import importlib
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import torch
from torch import distributed
from torch._C._distributed_c10d import HashStore, Store, TCPStore

from actors.engines.links import Ports, cut, listening
from runtime.fabric.collectives import exchange
from runtime.fabric.interface import Endpoint, Tag
from runtime.plan import WorkerId

JOIN_SECONDS = 20.0
"""How long the members of a group may take to connect: all were alive a moment ago."""

WORK_SECONDS = 1800.0
"""How long one collective may take. Losses are found by other means, long before."""


class Abandoned(RuntimeError):
    """The group was given up while it was being formed."""


class Rendezvous(Store):
    """A store whose waits end when the group is given up: torch's own only end when their time is up."""

    def __init__(self, store: Store, abandoned: threading.Event) -> None:
        super().__init__()
        self._store, self._abandoned = store, abandoned

    def set(self, key: str, value: Any) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        self._await([key])
        return self._store.get(key)

    def add(self, key: str, amount: int) -> int:
        return self._store.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(key)

    def num_keys(self) -> int:
        return self._store.num_keys()

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        self._await(keys)

    def _await(self, keys: list[str]) -> None:
        while not self._store.check(keys):
            if self._abandoned.wait(0.001):
                raise Abandoned("the group was given up while it was being formed")


class Group:
    """At most one world a process, of the members of one plan.

    ``form`` and ``leave`` are for the thread that trains, ``abandon`` for any other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._abandoned = threading.Event()
        self._kept: list[Any] = []
        self._ports: tuple[Ports, Ports] = frozenset(), frozenset()

    def begin(self) -> None:
        """From now on ``abandon`` means the group that is formed next."""
        self._abandoned.clear()

    def form(self, endpoint: Endpoint, generation: int, members: tuple[WorkerId, ...]) -> None:
        """Connects all members, ranks in the order of ``members``. Raises Interrupted as the endpoint does,
        and RuntimeError if a member is lost meanwhile."""
        rank = members.index(endpoint.worker)
        tag = Tag(generation, 0, 0, "rendezvous")
        limit = datetime.timedelta(seconds=JOIN_SECONDS)
        host = endpoint.address.rpartition(":")[0].strip("[]")
        if rank == 0:
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
            for member in members[1:]:
                endpoint.send(member, tag, note=(host, store.port))
        else:
            host, port = endpoint.receive(members[0], tag).note
            store = TCPStore(host, port, is_master=False, timeout=limit)
        before = listening()
        self._join(store, rank, len(members))
        mine = listening() - before
        ports = exchange(endpoint, members, Tag(generation, 0, 0, "ports"), mine)
        self._ports = mine, frozenset(port for other in ports.values() for port in other) - mine

    def form_alone(self) -> None:
        """A world of this worker only, for its warm-up."""
        self.begin()
        self._join(HashStore(), 0, 1)

    def _join(self, store: Store, rank: int, ranks: int) -> None:
        import deepspeed.comm.comm
        from deepspeed.utils import groups

        self._kept = [store, Rendezvous(store, self._abandoned)]
        on_gpu = self._device.type == "cuda"
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=self._kept[1],
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=JOIN_SECONDS),
        )
        world = distributed.group.WORLD
        assert world is not None
        distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=WORK_SECONDS), world)
        # DeepSpeed would clone the world, since old versions of torch could not look up ranks in it
        groups._WORLD_GROUP = world
        deepspeed.comm.comm.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)

    def wait_until_abandoned(self, seconds: float) -> bool:
        """Whether it has been given up within so many seconds."""
        return self._abandoned.wait(seconds)

    def abandon(self) -> None:
        """Ends every call that waits in the group. Does not wait itself."""
        self._abandoned.set()
        cut(*self._ports)
        if self._device.type == "cuda":
            for group in list(distributed.distributed_c10d._world.pg_map):
                with suppress(RuntimeError):  # it is being left at this moment
                    group.abort()

    def leave(self) -> None:
        """Lets go of the group, whatever state it is in. Without one it does nothing."""
        import deepspeed.comm.comm
        from deepspeed.utils import groups

        if distributed.is_initialized():
            with suppress(RuntimeError):  # an aborted one may have nothing left to shut down
                distributed.destroy_process_group()
        groups._release_process_group_references()
        deepspeed.comm.comm.cdb = None
        self._ports = frozenset(), frozenset()
        self._kept.clear()


def prepare_deepspeed() -> None:
    """Imports DeepSpeed and makes it fit for workers that come and go.

    Raises ValueError if it is not installed.
    """
    try:
        import deepspeed.ops
        from deepspeed.utils import logger
    except ImportError as error:
        raise ValueError(
            f'engine.name = "deepspeed" needs DeepSpeed, which cannot be imported here ({error}): install '
            "it on every machine by pip install -c constraints.txt 'reknit[deepspeed]'"
        ) from None
    # Its all-reduce in shared memory cannot be left when a peer dies, nor used across machines; without a
    # compiler, or while another process compiles it, an engine would not even start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    _import_muon()


def _import_muon() -> None:
    """Whatever the optimizer, DeepSpeed imports Muon to compare the two, and Muon's module has torch compile
    functions: every worker would import Inductor, two seconds of its start. Here they are compiled when
    somebody calls them."""
    from deepspeed.runtime import compiler

    at_once = compiler.compile
    compiler.compile = lambda: _compiled_when_called
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = at_once


def _compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """As ``torch.compile``, put off to the first call."""
    compiled: Callable[..., Any] | None = None

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = torch.compile(function)
        return compiled(*arguments, **named)

    return call
