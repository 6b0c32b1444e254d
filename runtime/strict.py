"""Plain values, as JSON gives them, made into dataclasses; nothing is guessed and nothing skipped.

A dataclass that forbids fields it does not know has ``__pydantic_config__ = STRICT``. pydantic is imported
with the first value that is read: a worker reads none, and the others train without it until it has started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter

T = TypeVar("T")

STRICT: ConfigDict = {"extra": "forbid"}

_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def read_strictly(kind: type[T], values: Mapping[str, Any]) -> T:
    """An instance of the dataclass ``kind``. Raises ValueError, which names the field, for a missing, unknown
    or ill-typed one."""
    try:
        value: T = _adapter(kind).validate_python(dict(values))
    except ValueError as error:
        from pydantic import ValidationError

        if not isinstance(error, ValidationError):
            raise
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or kind.__name__
        raise ValueError(f"{kind.__name__}: {place}: {first['msg']}") from error
    return value


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        from pydantic import TypeAdapter

        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
