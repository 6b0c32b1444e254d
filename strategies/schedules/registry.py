"""All schedules by name. A further one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from strategies.schedules import gpipe, one_f_one_b, zero_bubble
from strategies.schedules.instructions import Schedule

SCHEDULES: Mapping[str, Schedule] = {
    "gpipe": gpipe.instructions,
    "1f1b": one_f_one_b.instructions,
    "zero-bubble": zero_bubble.instructions,
}
DEFAULT = "1f1b"


def schedule_named(name: str) -> Schedule:
    """Raises ValueError, which lists the names, for an unknown one."""
    if name not in SCHEDULES:
        raise ValueError(f"{name!r} is no schedule: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]
