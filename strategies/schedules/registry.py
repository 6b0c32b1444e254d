"""All schedules by name. A further one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from strategies.schedules import gpipe, interleaved, one_f_one_b, skippipe, zero_bubble
from strategies.schedules.instructions import Schedule


class Entry(NamedTuple):
    """``chunked``: its workers hold several stages each. ``skips``: micro-batches pass only some stages."""

    instructions: Schedule
    chunked: bool = False
    skips: bool = False


SCHEDULES: Mapping[str, Entry] = {
    "gpipe": Entry(gpipe.instructions),
    "1f1b": Entry(one_f_one_b.instructions),
    "interleaved": Entry(interleaved.instructions, chunked=True),
    "zero-bubble": Entry(zero_bubble.instructions),
    "skippipe": Entry(skippipe.instructions, skips=True),
}
DEFAULT = "1f1b"


def skipping_schedules() -> str:
    """Those whose micro-batches pass only some stages, for a sentence."""
    return ", ".join(name for name, entry in SCHEDULES.items() if entry.skips)


def schedule_named(name: str, chunks: int) -> Schedule:
    """The schedule for workers of ``chunks`` stages each. Raises ValueError for an unknown name, which lists
    them all, and for a number of chunks that it cannot do."""
    if name not in SCHEDULES:
        raise ValueError(f"{name!r} is no schedule: choose one of {', '.join(SCHEDULES)}")
    instructions, chunked, _ = SCHEDULES[name]
    if chunked and chunks < 2:
        raise ValueError(f"the schedule {name} needs chunks of at least 2, not {chunks}: raise chunks")
    if chunks > 1 and not chunked:
        several = ", ".join(each for each, entry in SCHEDULES.items() if entry.chunked)
        raise ValueError(f"the schedule {name} has one chunk a worker, not {chunks}: choose {several}")
    return instructions
