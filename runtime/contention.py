"""How long a thread was kept from running because others had the cores."""

from __future__ import annotations

from pathlib import Path

SCHEDULED = Path("/proc/thread-self/schedstat")
"""Nanoseconds on a core, nanoseconds ready but without one, and the number of turns (Linux, proc(5))."""


def seconds_without_core() -> float:
    """Seconds that this thread has stood ready to run without a core so far; 0.0 where nothing is known."""
    try:
        return int(SCHEDULED.read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
