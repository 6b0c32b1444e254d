"""Amounts of memory as people write them."""

from __future__ import annotations

import re

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*")


def bytes_of(text: str) -> int:
    """``80GiB`` as a number of at least 1. Raises ValueError for anything else."""
    found = _AMOUNT.fullmatch(text)
    count = 0 if found is None else int(float(found[1]) * _UNITS.get(found[2].lower(), 0))
    if count < 1:
        raise ValueError(
            f"{text!r} is no amount of memory: write a number and a unit, such as 80GiB or 512MB"
        )
    return count
