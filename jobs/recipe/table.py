"""A recipe being read: the TOML file's table, what ``--set`` changes in it, and the check of the whole."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from jobs.recipe.errors import RecipeError, first_problem

RecipeModel = TypeVar("RecipeModel", bound=BaseModel)


def read_model(path: Path, overrides: Sequence[str], model: type[RecipeModel]) -> RecipeModel:
    """The file at ``path`` with ``overrides`` (``key=value``), checked. Raises RecipeError: one sentence."""
    table = read_table(path)
    overridden = {override(table, each) for each in overrides}
    try:
        return model.model_validate(table)
    except ValidationError as error:
        key, sentence = first_problem(error, model)
        by_override = key and any(
            f"{key}.".startswith(f"{each}.") or each.startswith(f"{key}.") for each in overridden
        )
        raise RecipeError(f"{'--set' if by_override else path.name}: {sentence}") from None


def read_table(path: Path) -> dict[str, Any]:
    """The recipe file as TOML gives it, unchecked. Raises RecipeError."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file; give the path of a recipe (.toml).") from None
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be read ({error.strerror}); give a readable recipe (.toml)."
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path.name}: byte {error.start} is not UTF-8: save the file as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        reason = str(error)
        raise RecipeError(
            f"{path.name}: not valid TOML, {reason[0].lower()}{reason[1:]}: mend that line."
        ) from None


def override(table: dict[str, Any], setting: str) -> str:
    """Puts one ``key=value`` into ``table``, in place; returns the key. Raises RecipeError.

    The value is TOML, or a bare word taken as text.
    """
    key, equals, text = (part.strip() for part in setting.partition("="))
    parts = key.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {setting}: write it as key=value, such as parallel.workers=6.")
    node: Any = table
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                place = ".".join(parts[:depth])
                raise RecipeError(
                    f"--set {key}: {place} is a list of {len(node)}, so {part} must be a number below that."
                )
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise RecipeError(
                f"--set {key}: {'.'.join(parts[:depth])} is a value and has no keys; set it itself."
            )
        if last:
            node[index] = _toml_value(setting, text)
        else:
            node = node.setdefault(index, {}) if isinstance(node, dict) else node[index]
    return key


def _toml_value(setting: str, text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
        if parsed.keys() == {"value"}:
            return parsed["value"]
    except tomllib.TOMLDecodeError:
        pass
    if not text or text[0] in "\"'[{" or "\n" in text:
        raise RecipeError(f"--set {setting}: the value is not valid TOML; put text in quotes.")
    return text
