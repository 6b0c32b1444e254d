"""What passes between layers: a tensor, or tuples, lists and dicts of tensors.

``flatten`` takes such a value apart into its tensors and a plain description from which
``unflatten`` puts it together again on another worker.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

Value = Any
"""A tensor, or tuples, lists and dicts (nested as one likes) of tensors and plain values."""

Spec = tuple[str, Any]


def flatten(value: Value) -> tuple[list[Tensor], Spec]:
    """The tensors of ``value`` in a fixed order, and what is needed to rebuild it."""
    tensors: list[Tensor] = []
    return tensors, _flatten(value, tensors)


def _flatten(value: Value, tensors: list[Tensor]) -> Spec:
    match value:
        case Tensor():
            tensors.append(value)
            return ("tensor", None)
        case tuple() | list():
            kind = "tuple" if isinstance(value, tuple) else "list"
            return (kind, [_flatten(item, tensors) for item in value])
        case dict():
            return ("dict", [(key, _flatten(item, tensors)) for key, item in value.items()])
        case None | bool() | int() | float() | str():
            return ("plain", value)
        case _:
            raise ValueError(
                f"a layer returned {type(value).__name__}; layers may pass tensors, tuples, lists, dicts, "
                "numbers and strings on to the next layer"
            )


def unflatten(tensors: list[Tensor], spec: Spec) -> Value:
    """The value that ``flatten`` took apart, holding ``tensors``."""
    return _unflatten(iter(tensors), spec)


def _unflatten(tensors: Any, spec: Spec) -> Value:
    kind, content = spec
    match kind:
        case "tensor":
            return next(tensors)
        case "tuple":
            return tuple(_unflatten(tensors, item) for item in content)
        case "list":
            return [_unflatten(tensors, item) for item in content]
        case "dict":
            return {key: _unflatten(tensors, item) for key, item in content}
        case _:
            return content
