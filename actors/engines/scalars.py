"""All of an engine's state that is not per parameter: step counters, learning rates, scheduler, loss scale.

It is the same on every rank and small, so it travels with a version's state in the place where the scales of
exact sums travel, as integers: the bytes of its JSON text (floats survive that exactly).
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from actors.engines.fragments import flats, inner_optimizer

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

Scalars = tuple[int, ...]


def read(engine: Any, stage: int) -> Scalars:
    """What the engine counts as it stands, at a step boundary."""
    inner = inner_optimizer(engine)
    state = inner.state[flats(engine, stage)[0].tensor]
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    scheduler = engine.lr_scheduler
    value = {
        "counters": {name: int(getattr(engine, name)) for name in _COUNTERS},
        "groups": [
            {name: entry for name, entry in group.items() if _is_plain(entry)} for group in inner.param_groups
        ],
        "state": {name: _number(entry) for name, entry in state.items() if _is_number(entry)},
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
        "scaler": {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)},
    }
    return tuple(json.dumps(value, sort_keys=True).encode())


def write(engine: Any, stage: int, scalars: Scalars) -> None:
    """Brings a fresh engine to what ``read`` gave of another one."""
    value = json.loads(bytes(scalars))
    for name, count in value["counters"].items():
        setattr(engine, name, count)
    inner = inner_optimizer(engine)
    for group, saved in zip(inner.param_groups, value["groups"], strict=True):
        for name in [name for name, entry in group.items() if _is_plain(entry) and name not in saved]:
            del group[name]
        # JSON has no tuples: betas come back as the type that they had
        group.update({n: tuple(e) if isinstance(group.get(n), tuple) else e for n, e in saved.items()})
    for flat in flats(engine, stage):
        _count(inner.state[flat.tensor], value["state"])
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(value["scheduler"])
        # it has no other way to learn them, and says them until its next step
        engine.lr_scheduler._last_lr = [group["lr"] for group in inner.param_groups]
    for name, entry in value["scaler"].items():
        setattr(engine.optimizer.loss_scaler, name, entry)


def count_from(engine: Any, stage: int, groups: list[dict[str, Any]], version: int) -> None:
    """Brings a fresh engine to ``version`` completed steps of which no scalars are known (of the initial
    state, or of a checkpoint of another engine). ``groups`` are the parameter groups as they were before
    ``make_moments``."""
    inner = inner_optimizer(engine)
    for group, before in zip(inner.param_groups, groups, strict=True):
        for name in [name for name in group if name != "params" and name not in before]:
            group[name] = version  # FusedAdam counts its steps there
        group.update({name: entry for name, entry in before.items() if name != "params"})
    for flat in flats(engine, stage):
        state = inner.state[flat.tensor]
        _count(state, {name: version for name, entry in state.items() if _is_number(entry)})
    engine.global_steps = version
    engine.global_samples = version * engine.train_batch_size()
    if engine.lr_scheduler is not None and version:
        engine.lr_scheduler.step(version - 1)


def _count(state: dict[str, Any], numbers: dict[str, float]) -> None:
    for name, number in numbers.items():
        if isinstance(state[name], Tensor):
            state[name].fill_(number)
        else:
            state[name] = number


def _is_number(entry: Any) -> bool:
    if isinstance(entry, Tensor):
        return entry.ndim == 0
    return isinstance(entry, (int, float)) and not isinstance(entry, bool)


def _number(entry: Any) -> float:
    return entry.item() if isinstance(entry, torch.Tensor) else entry


def _is_plain(entry: Any) -> bool:
    if isinstance(entry, (tuple, list)):
        return all(isinstance(each, (int, float, str)) for each in entry)
    return entry is None or isinstance(entry, (bool, int, float, str))
