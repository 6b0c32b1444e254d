"""What a recipe may leave to the search, and which choices do not go together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

from jobs.amounts import bytes_of
from strategies.schedules.registry import SCHEDULES, schedule_named

AUTO = "auto"
"""Of a schedule, a sharding or what is recomputed: the search chooses, anew for every plan."""


def _check_schedule(value: str) -> str:
    if value not in SCHEDULES and value != AUTO:
        raise ValueError(f'must be "auto" or one of {", ".join(SCHEDULES)}')
    return value


def _check_amount(value: str) -> str:
    bytes_of(value)
    return value


def _check_recompute(value: object) -> object:
    if value in ("none", "all", AUTO):
        return value
    if isinstance(value, list | tuple) and all(type(layer) is int and layer >= 0 for layer in value):
        return tuple(sorted(set(value)))
    raise ValueError('must be "none", "all", "auto" or a list of layer numbers, counted from 0')


ScheduleName = Annotated[str, AfterValidator(_check_schedule)]


def _check_sequence(value: object) -> object:
    if value == AUTO or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError('must be "auto" or a whole number of at least 1')


Degree = Annotated[int | Literal["auto"], BeforeValidator(_check_sequence)]
Amount = Annotated[str, AfterValidator(_check_amount)]
Recompute = Annotated[Literal["none", "all", "auto"] | tuple[int, ...], BeforeValidator(_check_recompute)]


def check_choices(
    schedule: str,
    chunks: int,
    recompute: object,
    *,
    has_memory: bool,
    sequence: int | Literal["auto"],
    sharding: str,
    engine: str,
) -> None:
    """Raises ValueError, one sentence with the key and the remedy, for choices that cannot be together."""
    if schedule != AUTO:
        try:
            schedule_named(schedule, chunks)
        except ValueError as error:
            raise ValueError(f"parallel.chunks does not fit parallel.schedule: {error}.") from None
    elif chunks > 1:
        raise ValueError(
            f"parallel.chunks ({chunks}) is chosen together with the schedule: remove it, or name a schedule."
        )
    searches = AUTO in (schedule, recompute, sequence, sharding)
    if has_memory and not searches:
        raise ValueError(
            "parallel.memory has a meaning only for a search: set parallel.schedule, parallel.sharding, "
            'parallel.sequence or precision.recompute to "auto", or remove memory.'
        )
    if searches and sequence not in (1, AUTO):
        raise ValueError(
            f"parallel.sequence ({sequence}) is for runs that name their strategy: set sequence to 1 or "
            '"auto", or name the schedule, the sharding and what is recomputed.'
        )
    if searches and engine != "reknit":
        raise ValueError(
            'a DeepSpeed engine has nothing to choose: set parallel.schedule to "1f1b" and '
            'precision.recompute to "none" and remove parallel.sharding, or remove [engine].'
        )
