"""Turns what pydantic says about a recipe into one sentence with the key and the remedy."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard, get_args

from pydantic import BaseModel, ValidationError

Location = tuple[int | str, ...]


class RecipeError(ValueError):
    """A person's mistake in a recipe: one sentence that names file, key and remedy."""


def dotted(location: Location) -> str:
    """``("faults", 0, "step")`` as a person writes it for ``--set``: ``faults.0.step``."""
    return ".".join(str(part) for part in location)


def shown(value: object) -> str:
    """A value as TOML would show it, long ones shortened."""
    if isinstance(value, Mapping):
        return "a table"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe; those of a list of tables carry the index 0."""
    for name, field in model.model_fields.items():
        yield prefix + name
        annotation = field.annotation
        if _is_section(annotation):
            yield from known_keys(annotation, f"{prefix}{name}.")
        for element in get_args(annotation):
            if _is_section(element):
                yield from known_keys(element, f"{prefix}{name}.0.")


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    # tuple[X, ...] passes isinstance(_, type) but not issubclass.
    plain = isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias)
    return plain and issubclass(annotation, BaseModel)


def first_problem(error: ValidationError, recipe: type[BaseModel]) -> tuple[str, str]:
    """The problem to mend first: (its dotted key, a sentence about it that begins with the key).

    A misspelt key comes before the missing key that it causes, and both before wrong values.
    """
    rank = {"extra_forbidden": 0, "missing": 1}
    problem = min(error.errors(include_url=False), key=lambda each: rank.get(each["type"], 2))
    kind, location, given = problem["type"], problem["loc"], problem["input"]
    limits: dict[str, Any] = problem.get("ctx", {})
    key = dotted(location)
    if not key:
        assert kind == "value_error", kind
        return "", problem["msg"].removeprefix("Value error, ")
    if kind == "missing" and isinstance(location[-1], int):
        parent = dotted(location[:-1])
        return parent, f"{parent} must have {location[-1] + 1} values, not {location[-1]}."
    return key, f"{key} {_complaint(kind, location, given, limits, problem['msg'], recipe)}"


def _complaint(
    kind: str,
    location: Location,
    given: object,
    limits: dict[str, Any],
    message: str,
    recipe: type[BaseModel],
) -> str:
    if kind == "extra_forbidden":
        return f"is not a known key{_suggestion(location, recipe)}"
    if kind == "missing":
        section = dotted(location[:-1])
        return f"is missing: add it {f'to [{section}]' if section else 'as a section of its own'}."
    if kind == "value_error":
        told = message.removeprefix("Value error, ")  # of a table's value it says itself which one is meant
        return f"{told}." if isinstance(given, Mapping) else f"{told}, not {shown(given)}."
    wanted = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "string_type": "text in quotes",
        "string_too_short": "text that is not empty",
        "bool_type": "true or false",
        "tuple_type": "a list",
        "dict_type": "a table",
        "model_type": "a table",
        "literal_error": f"one of {limits.get('expected', '')}".replace("'", '"').replace(" or ", ", "),
        "greater_than_equal": f"at least {limits.get('ge', 0):g}",
        "greater_than": f"greater than {limits.get('gt', 0):g}",
        "less_than_equal": f"at most {limits.get('le', 0):g}",
        "less_than": f"below {limits.get('lt', 0):g}",
        "too_long": f"a list of at most {limits.get('max_length')} values",
    }.get(kind)
    if wanted is None:
        return f"is wrong ({message}), given {shown(given)}."
    return f"must be {wanted}, not {shown(given)}."


def _suggestion(location: Location, recipe: type[BaseModel]) -> str:
    """The known key nearest to an unknown one: a slip of spelling, or the right name in the wrong
    section."""
    section = dotted(location[:-1])
    prefix = f"{section}." if section else ""
    generic = dotted(tuple(0 if isinstance(part, int) else part for part in location))
    name, keys = str(location[-1]), list(known_keys(recipe))
    elsewhere = [key for key in keys if key.rsplit(".", 1)[-1] == name]
    level = [key for key in keys if key.count(".") == generic.count(".")]
    near = elsewhere or difflib.get_close_matches(generic, level, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {near[0]}?"
    parent = generic.rpartition(".")[0]
    siblings = [key.rsplit(".", 1)[-1] for key in level if key.rpartition(".")[0] == parent]
    return f": remove it, or choose from {', '.join(f'{prefix}{each}' for each in siblings)}."
