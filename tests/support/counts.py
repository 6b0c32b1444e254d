"""A request that a served application of numbers is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Count:
    """Asks for 0, 1, 2, ..., or to go on behind those given."""

    given: tuple[int, ...] = ()

    def continued(self, given: tuple[int, ...], version: int) -> Count:
        return replace(self, given=given)
