"""The two kinds of patch that Ray's autoscaler and the helpers here send."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"


def json_patch(document: Any, operations: Sequence[Mapping[str, Any]]) -> Any:
    """RFC 6902, without ``move`` and ``copy``. Raises ValueError where an operation does not apply; then none
    has been applied."""
    made = copy.deepcopy(document)
    for operation in operations:
        kind, path = operation["op"], operation["path"]
        *way, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
        try:
            target = made
            for part in way:
                target = target[int(part)] if isinstance(target, list) else target[part]
            if isinstance(target, list):
                _in_list(target, kind, last, operation.get("value"))
            else:
                _in_object(target, kind, last, operation.get("value"))
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{kind} {path}: there is no such place") from error
    return made


def _in_list(target: list[Any], kind: str, last: str, value: Any) -> None:
    if kind == "add":
        if last != "-" and not 0 <= int(last) <= len(target):
            raise IndexError(last)
        target.insert(len(target) if last == "-" else int(last), value)
        return
    index = int(last)
    if not 0 <= index < len(target):
        raise IndexError(last)
    if kind == "remove":
        del target[index]
    elif kind == "replace":
        target[index] = value
    elif kind == "test":
        _test(target[index], value)
    else:
        raise ValueError(f"{kind} is no operation known here")


def _in_object(target: dict[str, Any], kind: str, last: str, value: Any) -> None:
    if kind in ("remove", "replace", "test") and last not in target:
        raise KeyError(last)
    if kind == "remove":
        del target[last]
    elif kind in ("add", "replace"):
        target[last] = value
    elif kind == "test":
        _test(target[last], value)
    else:
        raise ValueError(f"{kind} is no operation known here")


def _test(found: Any, value: Any) -> None:
    if found != value:
        raise ValueError(f"the test failed: found {found!r}, not {value!r}")


def merge_patch(document: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    made = copy.deepcopy(document) if isinstance(document, dict) else {}
    for key, value in patch.items():
        if value is None:
            made.pop(key, None)
        else:
            made[key] = merge_patch(made.get(key), value)
    return made
