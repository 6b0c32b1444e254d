"""Notes as bytes, and back, without pickle: bytes from the network can become values, and nothing else.

Plain values are msgpack. Classes travel under a name that both sides have given to ``carry``; a name that
was not given is no message. A list arrives as a tuple, and so does a named tuple.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from typing import Any

import msgpack
import numpy as np

_OBJECT, _MEMBER, _SET, _INTEGER, _ARRAY = range(5)
_NUMBERS = "biuf"
_MAX_DEPTH = 32

_classes: dict[str, type[Any]] = {}
_fields: dict[type[Any], tuple[str, ...]] = {}
_last: dict[type[Any], tuple[Any, bytes]] = {}
"""The value of each shared class that was encoded last, and its encoding."""


def carry(*classes: type[Any], shared: tuple[type[Any], ...] = ()) -> None:
    """Lets values of these dataclasses and enums be parts of notes. Idempotent.

    ``shared`` classes are immutable all through, and one value of theirs goes to many: it is encoded once.
    """
    _last.update({cls: _last.get(cls, (None, b"")) for cls in shared})
    for cls in (*classes, *shared):
        assert _classes.setdefault(cls.__name__, cls) is cls, f"two classes {cls.__name__}"
        if is_dataclass(cls):
            _fields[cls] = tuple(field.name for field in fields(cls))


def dumps(note: Any) -> bytes:
    """Raises TypeError for a value that a note cannot hold."""
    return bytes(msgpack.packb(note, default=_encode))


def loads(data: bytes | bytearray | memoryview) -> Any:
    """Raises ValueError for bytes that are no note."""
    return _loads(data, 0)


def _loads(data: bytes | bytearray | memoryview, depth: int) -> Any:
    if depth > _MAX_DEPTH:  # before the C stack ends, and the process with it
        raise ValueError(f"a note of more than {_MAX_DEPTH} levels")
    try:
        return msgpack.unpackb(
            data, use_list=False, strict_map_key=False, ext_hook=partial(_decode, depth + 1)
        )
    except (msgpack.UnpackException, TypeError, KeyError) as error:
        raise ValueError(f"bytes that are no note ({type(error).__name__}: {error})") from None


def _encode(value: Any) -> Any:
    cls = type(value)
    names = _fields.get(cls)
    if names is not None:
        kept = _last.get(cls)
        if kept is not None and kept[0] is value:
            return msgpack.ExtType(_OBJECT, kept[1])
        packed = dumps((cls.__name__, *[getattr(value, name) for name in names]))
        if kept is not None:
            _last[cls] = value, packed
        return msgpack.ExtType(_OBJECT, packed)
    if isinstance(value, Enum) and cls.__name__ in _classes:
        return msgpack.ExtType(_MEMBER, dumps((cls.__name__, value.name)))
    if isinstance(value, (set, frozenset)):
        return msgpack.ExtType(_SET, dumps((isinstance(value, frozenset), *value)))
    if isinstance(value, int):  # of more than 64 bits: exact sums of squares
        size = value.bit_length() // 8 + 1
        return msgpack.ExtType(_INTEGER, value.to_bytes(size, "big", signed=True))
    if isinstance(value, np.ndarray) and value.dtype.kind in _NUMBERS:
        return msgpack.ExtType(_ARRAY, dumps((value.dtype.str, value.shape, value.tobytes())))
    raise TypeError(f"a note cannot hold a {cls.__qualname__}: its class was not given to carry()")


def _decode(depth: int, code: int, data: bytes) -> Any:
    if code == _INTEGER:
        return int.from_bytes(data, "big", signed=True)
    kind, *values = _loads(data, depth)
    if code == _OBJECT:
        return _classes[kind](*values)
    if code == _MEMBER:
        (name,) = values
        return _classes[kind][name]
    if code == _SET:
        return frozenset(values) if kind else set(values)
    if code == _ARRAY and np.dtype(kind).kind in _NUMBERS:
        shape, content = values
        return np.frombuffer(content, kind).reshape(shape).copy()
    raise ValueError(f"an unknown kind of value: {code}")
