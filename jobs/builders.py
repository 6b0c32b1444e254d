"""What a recipe names by ``package.module:function``.

Every worker and the controller import this to unpickle the job, so it imports little, and no PyTorch: that is
time the others train without it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from strategies.model import LossFunction
    from strategies.pipeline import Data

BUILDER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def build_layers(name: str, arguments: Mapping[str, Any]) -> tuple[list[nn.Module], LossFunction]:
    """Calls the recipe's model builder. Raises ValueError if it cannot be found or called so."""
    built: tuple[list[nn.Module], LossFunction] = _call(name, arguments, "model.arguments")
    return built


def build_data(name: str, arguments: Mapping[str, Any]) -> Data:
    """Calls the recipe's data builder. Raises ValueError if it cannot be found or called so."""
    data: Data = _call(name, arguments, "data.arguments")
    return data


def _call(name: str, arguments: Mapping[str, Any], key: str) -> Any:
    builder = load_builder(name)
    try:
        return builder(**arguments)
    except TypeError as error:
        raise ValueError(f"{name} does not take the recipe's {key}: {error}") from error


def load_builder(name: str) -> Callable[..., Any]:
    """The function that ``"package.module:function"`` names. Raises ValueError."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not BUILDER.fullmatch(name):
        raise ValueError(f'"{name}" does not name a builder: write "package.module:function".')
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            remedy = "install its package or put its folder on PYTHONPATH"
        else:
            remedy = f"it is imported by {module_name}, so install its package"
        raise ValueError(f"{name}: there is no module {missing}: {remedy}.") from error
    function = getattr(module, attribute, None)
    if function is None:
        raise ValueError(
            f"{name}: the module {module_name} has no {attribute}: name a function that it defines."
        )
    if not callable(function):
        raise ValueError(f"{name}: {attribute} is not callable: name a function that builds.")
    builder: Callable[..., Any] = function
    return builder
