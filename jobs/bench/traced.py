"""Layers whose compute is emulated by sleeping, that say when they compute and carry state worth moving.

As ``emulated``, for benches of changes of plan: each layer may have many parameters besides, which nothing
computes with, but which are updated, divided, backed up and moved like any others; and each process may
keep a ledger of the sleeps that it has begun, which tells what a killed worker had computed.
"""

from __future__ import annotations

import math
import os
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.bench.emulated import BACKWARD, loss
from strategies.move import Mover

WIDTH = 64


class Ledger:
    """When this process computes: a line for each beginning and each end, in a file named after it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def sleep(self, seconds: float) -> None:
        """The beginning is written before the sleep: of the last one of a killed process it is known."""
        if self._descriptor is None:
            flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
            self._descriptor = os.open(self._folder / str(os.getpid()), flags, 0o600)
        os.write(self._descriptor, f"{time.time()!r}\n".encode())
        time.sleep(seconds)
        os.write(self._descriptor, f"{time.time()!r}\n".encode())


def entries(folder: Path, process: int) -> list[tuple[float, float]]:
    """(beginning, end) of every sleep of the process, ascending, in ``time.time()``; the end is infinite
    where none came."""
    times = [float(line) for line in (folder / str(process)).read_text().splitlines()]
    return list(zip_longest(times[::2], times[1::2], fillvalue=math.inf))


def computed(entries: list[tuple[float, float]], begin: float, end: float) -> float:
    """Seconds of computing from ``begin`` to ``end``, both ``time.time()``."""
    return sum(max(0.0, min(ended, end) - max(began, begin)) for began, ended in entries)


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, seconds: float, ledger: Ledger | None) -> Tensor:
        ctx.seconds, ctx.ledger = seconds, ledger
        _sleep(seconds, ledger)
        return x_BD.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        _sleep(BACKWARD * ctx.seconds, ctx.ledger)
        return gradients[0], None, None


def _sleep(seconds: float, ledger: Ledger | None) -> None:
    if ledger is None:
        time.sleep(seconds)
    else:
        ledger.sleep(seconds)


class TracedLayer(nn.Module):
    """``x_BD`` to ``x_BD``: forward takes ``seconds``, backward twice that. ``rows`` x ``WIDTH`` parameters
    are carried along; they get no gradient, but decay."""

    def __init__(self, seconds: float, rows: int, ledger: Ledger | None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        if rows:
            self.carried = nn.Parameter(torch.ones(rows, WIDTH))
        self._seconds, self._ledger = seconds, ledger

    def forward(self, x_BD: Tensor) -> Tensor:
        slept: Tensor = _Compute.apply(x_BD * self.scale, self._seconds, self._ledger)  # type: ignore[no-untyped-call]
        return slept


_move = Mover.move


def _move_everything(mover: Mover) -> None:
    """As ``Mover.move``, with all that is owed: parameters, moments and copies for backups."""
    _move(mover)
    settled, mover.on_settled = mover.on_settled, lambda: None
    mover.settle(wait=True)
    # whoever watches expects to hear that a worker has moved before it hears that it is owed nothing
    mover.on_settled, mover._settled = settled, False


def build(
    *,
    layers: int,
    forward_seconds: float,
    parameters: int = 0,
    ledger: str | None = None,
    at_once: bool = False,
) -> tuple[list[nn.Module], Any]:
    """``layers`` layers and the loss. ``parameters`` are carried by each (rounded down to rows of ``WIDTH``);
    ``ledger`` is a folder that exists.

    ``at_once`` makes every change of plan of this process, from now on, move everything before the next
    forward: the baseline that moving parameters first is compared with.
    """
    if at_once:
        Mover.move = _move_everything  # type: ignore[assignment,method-assign]
    kept = None if ledger is None else Ledger(Path(ledger))
    return [TracedLayer(forward_seconds, parameters // WIDTH, kept) for _ in range(layers)], loss
