from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from runtime.strict import STRICT, read_strictly

if TYPE_CHECKING:
    from pydantic import ConfigDict


@dataclass(frozen=True)
class Inner:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    names: tuple[str, ...]


@dataclass(frozen=True)
class Outer:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    number: int
    inner: Inner


def test_what_was_written_is_read() -> None:
    assert read_strictly(Outer, {"number": 3, "inner": {"names": ["a"]}}) == Outer(3, Inner(("a",)))


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"number": 3}, "Outer: inner"),
        ({"number": "three", "inner": {"names": []}}, "Outer: number"),
        ({"number": 3, "inner": {"names": [], "more": 1}}, "Outer: inner.more"),
        ({"number": 3, "inner": {"names": []}, "more": 1}, "Outer: more"),
    ],
)
def test_what_was_not_is_refused_by_its_place(values: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=f"^{place}: "):
        read_strictly(Outer, values)
