"""Longer turns on a processor for a thread that computes, where there are more such threads than processors.

Linux gives each thread on a processor some milliseconds at a time, and the next one finds the caches full of
another's data: four processes that train on two cores with 1 MiB of cache each took 4.6% more processor time
than two of them at a time, and about half of that with turns of 20 ms.

A thread asks for longer turns by ``sched_runtime`` of sched_setattr(2), which Linux heeds from 6.12 on; no
privilege is needed. One that has not asked and wakes up still interrupts one that has: so heartbeats and
messages are not held up, as long as nobody asks who waits.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

SLICE_SECONDS = 0.02

_NUMBERS = {"x86_64": 314, "aarch64": 274}  # of sched_setattr, which older C libraries have no function for
_KEEP_POLICY = 0x08


class _Attributes(ctypes.Structure):
    """``struct sched_attr`` of linux/sched/types.h, in its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def _system_call() -> Callable[..., int] | None:
    """Takes attributes and flags, for the calling thread."""
    number = _NUMBERS.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None:
        return None
    try:
        return partial(ctypes.CDLL(None).syscall, ctypes.c_long(number), ctypes.c_long(0))
    except (OSError, AttributeError):
        return None


_call = _system_call()


def ask_for_slices(seconds: float) -> bool:
    """Asks for turns of so many seconds for the calling thread; 0.0: as the system sees fit. Returns whether
    the system understood (an older kernel does, and changes nothing)."""
    if _call is None:
        return False
    attributes = _Attributes(
        size=ctypes.sizeof(_Attributes),
        flags=_KEEP_POLICY,
        nice=os.getpriority(os.PRIO_PROCESS, 0),  # it cannot be left out: the thread's own
        runtime=int(seconds * 1e9),
    )
    return _call(ctypes.byref(attributes), ctypes.c_long(0)) == 0


@contextmanager
def long_slices() -> Iterator[None]:
    """The calling thread computes meanwhile, and waits for nobody."""
    asked = ask_for_slices(SLICE_SECONDS)
    try:
        yield
    finally:
        if asked:
            ask_for_slices(0.0)
