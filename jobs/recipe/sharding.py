"""What a recipe may say of who keeps which parameters, sums and optimizer states."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from jobs.recipe.choices import AUTO
from strategies.search.memory import SHARDINGS as SEARCHED
from strategies.shardings.registry import DEFAULT, SHARDINGS


def _check_name(value: str) -> str:
    if value not in SHARDINGS and value != AUTO:
        raise ValueError(f'must be "auto" or one of {", ".join(SHARDINGS)}')
    return value


ShardingName = Annotated[str, AfterValidator(_check_name)]


def possible_shardings(reduction: str, slices: int) -> tuple[str, ...]:
    """Those that a search may choose. Floating-point sums want an order, which only some shardings have, and
    sequences in ``slices`` are added up where they are computed."""
    return tuple(
        name
        for name in SEARCHED
        if (reduction == "exact" or SHARDINGS[name].ordered) and (slices == 1 or SHARDINGS[name].salvages)
    )


def check_sharding(sharding: str, offloads: bool, reduction: str, engine: str) -> None:
    """Raises ValueError for a combination that cannot be."""
    if engine != "reknit" and (sharding != DEFAULT or offloads):
        key = "sharding" if sharding != DEFAULT else "offload"
        raise ValueError(
            f"parallel.{key} is of Reknit's own engine: remove it, and let the file that engine.config names "
            f"({engine}) say how to shard."
        )
    if sharding == AUTO:
        return
    entry = SHARDINGS[sharding]
    if reduction == "fast" and not entry.ordered:
        ordered = " or ".join(name for name, each in SHARDINGS.items() if each.ordered)
        raise ValueError(
            f"parallel.sharding ({sharding}) adds gradients as they come, on which the bits of reduction = "
            f'"fast" would depend: set reduction to "exact", or parallel.sharding to {ordered}.'
        )
    if offloads and not entry.keeps.parameters:
        whole = ", ".join(name for name, each in SHARDINGS.items() if each.keeps.parameters)
        raise ValueError(
            f"parallel.offload has no meaning with parallel.sharding ({sharding}), which keeps no parameters "
            f"on the device: remove parallel.offload, or set parallel.sharding to one of {whole}."
        )
